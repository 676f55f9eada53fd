"""The identity of a pass: a hash of its source code and of its options.

A fingerprint that is too coarse silently reuses an artifact which another pass generated, so whatever cannot be
written down canonically is refused rather than skipped.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

_ATOMS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def pass_fingerprint(cls: type, depends_on: Iterable[str], options: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of a pass: the class and its bases, the modules it depends on, its instance attributes.

    Raises:
        TypeError: no source can be found, or an option has no canonical text; the message names the remedy.
    """
    digest = hashlib.sha256()
    for base in cls.__mro__[:-1]:
        if base.__module__ not in ("abc", "builtins"):
            _feed(digest, f"class {base.__module__}.{base.__qualname__}", _class_source(base))
    for module in depends_on:
        _feed(digest, f"module {module}", _module_source(module))
    for name in sorted(options):
        _feed(digest, f"option {name}", canonical(options[name]).encode())
    return digest.hexdigest()


def canonical(value: Any) -> str:
    """Text that is equal for equal option values, in every process, and different for different ones.

    Raises:
        TypeError: ``value`` is of a type whose text says nothing reliable (a callable, a tensor, an object).
    """
    if isinstance(value, enum.Enum):
        return f"{_type_name(value)}.{value.name}"
    if type(value) in _ATOMS:
        return f"{type(value).__name__}:{value!r}"
    if type(value) in (tuple, list):
        return f"{type(value).__name__}[{','.join(map(canonical, value))}]"
    if type(value) in (set, frozenset):
        return f"{type(value).__name__}[{','.join(sorted(map(canonical, value)))}]"
    if type(value) is dict:
        items = sorted((canonical(key), canonical(item)) for key, item in value.items())
        return f"dict[{','.join(f'{key}={item}' for key, item in items)}]"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return f"{_type_name(value)}{canonical(fields)}"
    raise TypeError(
        f"a pass option of type {_type_name(value)} ({value!r}) has no canonical text for the pass's fingerprint: "
        "keep it as numbers, strings, dtypes, enums, dataclasses or containers of them, or override fingerprint()"
    )


def _feed(digest: hashlib._Hash, label: str, content: bytes) -> None:
    """Length-prefixed, so that no two sequences of parts give the same stream."""
    for part in (label.encode(), content):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)


def _class_source(cls: type) -> bytes:
    """The whole file of a class, since helpers beside it count too; the class alone where there is no file."""
    module = sys.modules.get(cls.__module__)
    file = getattr(module, "__file__", None)
    if file is not None and Path(file).suffix == ".py":
        return _file_bytes(file)
    try:
        return inspect.getsource(cls).encode()
    except (OSError, TypeError) as error:
        raise _no_source(f"class {cls.__module__}.{cls.__qualname__}") from error


def _module_source(name: str) -> bytes:
    """The file of a module, found without importing it: a Triton kernel counts also where Triton is missing."""
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise _no_source(f"module {name}")
    return _file_bytes(spec.origin)


def _no_source(what: str) -> TypeError:
    return TypeError(f"the source of {what} cannot be found for the pass's fingerprint: override fingerprint()")


@functools.cache
def _file_bytes(path: str) -> bytes:
    # Cached on purpose: the process runs the code it imported, not what an editor wrote into the file since.
    return Path(path).read_bytes()


def _type_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
