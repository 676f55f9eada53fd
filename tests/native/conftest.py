from __future__ import annotations

import functools
import os
from pathlib import Path
from types import ModuleType

import pytest

from graphcap.native import fallback, loader
from graphcap.native.build import BuildError


@functools.cache
def built() -> ModuleType | str:
    """The extension, or why this machine cannot have it. Built once for all workers of a run, and again for the next;
    a developer who runs the tests often names a directory."""
    kernels = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])  # of this run, or the developer's: see tests/conftest.py
    try:
        return loader.find_or_build(kernels / "graphcap-native")
    except BuildError as error:
        return str(error)


@pytest.fixture(params=["python", "extension"])
def checks(request: pytest.FixtureRequest) -> ModuleType:
    """One of the two implementations, which must not differ."""
    if request.param == "python":
        return fallback
    extension = built()
    if isinstance(extension, str):
        pytest.skip(extension)
    return extension
