"""From a cache directory to the loaded extension: found there, or built into it; never loaded when not trusted."""

from __future__ import annotations

import logging
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import torch

from graphcap.lock import file_lock
from graphcap.native.build import NAME, TIMEOUT_SECONDS, BuildError, build, recipe
from graphcap.trust import distrust_directory, distrust_library

_log = logging.getLogger(__name__)


def find(root: Path) -> ModuleType | None:
    """The extension, if an earlier process has built it below ``root``.

    Raises:
        BuildError: it cannot be built here, or what is there is not trusted or does not load.
        OSError: it cannot be read.
    """
    path = _path(root, recipe().digest)
    return _load(path) if path.exists() else None


def find_or_build(root: Path) -> ModuleType:
    """The extension. Processes that want the same one wait for each other; one that does not load is built again.

    Raises:
        BuildError: it cannot be built, is not trusted, or does not load.
        OSError: the directory cannot be read or written.
    """
    how = recipe()
    path = _path(root, how.digest)
    for directory in (root, path.parent.parent, path.parent):
        if not directory.is_dir():
            directory.parent.mkdir(parents=True, exist_ok=True)
            directory.mkdir(mode=0o700, exist_ok=True)
    _refuse_distrusted(path)
    with file_lock(path.with_name("lock"), TIMEOUT_SECONDS):
        if path.exists():
            try:
                return _load(path)
            except ImportError as error:
                _log.info("building the native checks again: %s", error)
        build(how, path)
    try:
        return _load(path)
    except ImportError as error:
        raise BuildError(f"what was built does not load: {error}") from error


def _path(root: Path, digest: str) -> Path:
    return root / "native" / digest / f"{NAME}.so"


def _refuse_distrusted(path: Path) -> None:
    for directory in (path.parents[2], path.parents[1], path.parent):
        if reason := distrust_directory(directory):
            raise BuildError(reason)


def _load(path: Path) -> ModuleType:
    """Runs code."""
    _refuse_distrusted(path)
    if reason := distrust_library(path):
        raise BuildError(reason)
    spec = spec_from_loader(NAME, ExtensionFileLoader(NAME, str(path)))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    _try_out(module)
    return module


def _try_out(module: ModuleType) -> None:
    """One true and one false of each; a library that answers wrongly is as good as none."""
    tensor, other, holder = torch.empty(1, device="cpu"), torch.empty(1, device="cpu"), {"key": None}
    lies_there = module.AddressCheck([1], [tensor.data_ptr()])
    holds = module.IdentityCheck([(holder, "key", None)])
    same = module.AnswerCheck([(len, (holder,), 1), (module.ThreadState(), (), True)])
    apart = module.ApartCheck([0], [tensor.data_ptr()])
    answers = [lies_there((None, tensor)), lies_there((tensor, other)), holds(), same(), apart([other])]
    holder.clear()
    module.GroupedCopy([tensor.zero_()], [1])((None, other.fill_(1.0)))
    if [*answers, holds(), same(), apart([tensor]), tensor.item()] != [True, False, *[True] * 3, *[False] * 3, 1.0]:
        raise BuildError("the extension answers wrongly")
