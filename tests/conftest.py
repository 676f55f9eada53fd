"""What every test starts from: an empty cache, no GRAPHCAP_* of the developer's, one thread, a fresh Dynamo."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported. Without the first two, Inductor's first kernel on a CPU probes instruction sets and
# precompiles headers: half a minute. Kernels are shared between the tests and workers of a run (graphcap's own cache
# never is), and between runs where the developer names a directory.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
os.environ.setdefault("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    # pytest-xdist workers inherit it from the process that starts them.
    _kernels = tempfile.TemporaryDirectory(prefix="graphcap-tests-inductor-", ignore_cleanup_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = _kernels.name

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# A shared machine is slow at times: a deadline per example would fail by chance. CI draws the same examples every time.
settings.register_profile("graphcap", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("graphcap")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [name for name in os.environ if name.startswith("GRAPHCAP_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("GRAPHCAP_CACHE_DIR", str(tmp_path / "graphcap-cache"))


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    """What one test compiled is not seen by the next; tests that never touched Dynamo do not pay for its import."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
        # torch 2.11 leaves it False when calls of torch.compile(dynamic=True) in several threads end in another order
        # than they began; every later trace of the process then takes all sizes for dynamic.
        torch._dynamo.config.assume_static_by_default = True
