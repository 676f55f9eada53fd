"""The door: what is exported, and that it is cheap to open."""

from __future__ import annotations

import subprocess
import sys

import pytest

import graphcap

PUBLIC = {
    "CUDAGraphMode",
    "CaptureSummary",
    "CompilationMode",
    "Config",
    "ConfigError",
    "Dim",
    "DimError",
    "Dispatch",
    "GraphKey",
    "GraphcapError",
    "GuardError",
    "MissingExtraError",
    "PassRequiredError",
    "RankError",
    "RecompileError",
    "StaleOutputError",
    "StepError",
    "__version__",
    "allow_capture",
    "capture",
    "compile",
    "current_step",
    "disabled",
    "dispatch",
    "eager",
    "explain",
    "hooks",
    "memory",
    "register_generator",
    "profile",
    "register_op",
    "step",
    "release",
    "reset",
    "set_graph_pool",
    "suggest_ladder",
    "support_graph_compile",
}


def test_public_names() -> None:
    assert set(graphcap.__all__) == PUBLIC
    assert dir(graphcap) == sorted(PUBLIC)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_name_is_there(name: str) -> None:
    assert getattr(graphcap, name) is getattr(graphcap, name)


@pytest.mark.parametrize("name", sorted(PUBLIC - {"__version__"}))
def test_every_name_is_documented(name: str) -> None:
    assert getattr(graphcap, name).__doc__


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'capture_all'"):
        graphcap.capture_all  # noqa: B018


def test_import_does_not_load_torch() -> None:
    program = "import graphcap, sys; graphcap.Config.resolve(); print(sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "'graphcap'" in loaded
    assert "'torch'" not in loaded
