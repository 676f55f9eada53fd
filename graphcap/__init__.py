"""graphcap: a ``torch.compile`` backend for inference that captures a model into CUDA graphs, piece by piece.

``torch.compile(model, backend="graphcap")`` needs no import of this package. What is imported from here is for the
rest: configuration, the class decorator, the report. Importing it stays cheap: names that need torch load on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from graphcap.config import CompilationMode, Config, CUDAGraphMode
from graphcap.errors import (
    ConfigError,
    DimError,
    GraphcapError,
    GuardError,
    MissingExtraError,
    PassRequiredError,
    RankError,
    RecompileError,
    StaleOutputError,
    StepError,
)

if TYPE_CHECKING:
    from graphcap.compiler.debug.explain import explain
    from graphcap.compiler.debug.profile import profile
    from graphcap.compiler.debug.suggest import suggest_ladder
    from graphcap.compiler.eager_functions import eager
    from graphcap.compiler.frontend.api import compile
    from graphcap.compiler.frontend.decorator import disabled, support_graph_compile
    from graphcap.compiler.frontend.dims import Dim
    from graphcap.compiler.frontend.dispatch import dispatch
    from graphcap.compiler.frontend.ladder_capture import CaptureSummary
    from graphcap.compiler.frontend.lifecycle import release, reset
    from graphcap.compiler.frontend.serving import capture
    from graphcap.compiler.rules import register_op
    from graphcap.cudagraph.dispatch.current_step import current_step
    from graphcap.cudagraph.dispatch.key import Dispatch, GraphKey
    from graphcap.cudagraph.dispatch.phase import allow_capture
    from graphcap.cudagraph.dispatch.step import step
    from graphcap.cudagraph.hardware import hooks
    from graphcap.cudagraph.hardware.choose import set_graph_pool
    from graphcap.cudagraph.hardware.generators import register_generator
    from graphcap.cudagraph.hardware.memory import memory

__version__ = "0.1.0.dev0"

__all__ = [
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
]

#: Where the names that need torch live.
_LAZY = {
    "CaptureSummary": "graphcap.compiler.frontend.ladder_capture",
    "Dispatch": "graphcap.cudagraph.dispatch.step",
    "GraphKey": "graphcap.cudagraph.dispatch.step",
    "allow_capture": "graphcap.cudagraph.dispatch.phase",
    "capture": "graphcap.compiler.frontend.serving",
    "current_step": "graphcap.cudagraph.dispatch.current_step",
    "dispatch": "graphcap.compiler.frontend.dispatch",
    "step": "graphcap.cudagraph.dispatch.step",
    "Dim": "graphcap.compiler.frontend.dims",
    "compile": "graphcap.compiler.frontend.api",
    "disabled": "graphcap.compiler.frontend.decorator",
    "eager": "graphcap.compiler.eager_functions",
    "explain": "graphcap.compiler.debug.explain",
    "hooks": "graphcap.cudagraph.hardware",
    "memory": "graphcap.cudagraph.hardware.memory",
    "register_generator": "graphcap.cudagraph.hardware.generators",
    "profile": "graphcap.compiler.debug.profile",
    "register_op": "graphcap.compiler.rules",
    "release": "graphcap.compiler.frontend.lifecycle",
    "reset": "graphcap.compiler.frontend.lifecycle",
    "set_graph_pool": "graphcap.cudagraph.hardware.choose",
    "suggest_ladder": "graphcap.compiler.debug.suggest",
    "support_graph_compile": "graphcap.compiler.frontend.decorator",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'graphcap' has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
