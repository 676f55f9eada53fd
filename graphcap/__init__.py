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
    RecompileError,
    StaleOutputError,
    StepError,
)

if TYPE_CHECKING:
    from graphcap.compiler.debug.explain import explain
    from graphcap.compiler.debug.profile import profile
    from graphcap.compiler.frontend.api import compile
    from graphcap.compiler.frontend.decorator import disabled, support_graph_compile
    from graphcap.compiler.rules import eager, register_op

__version__ = "0.1.0.dev0"

__all__ = [
    "CUDAGraphMode",
    "CompilationMode",
    "Config",
    "ConfigError",
    "DimError",
    "GraphcapError",
    "GuardError",
    "MissingExtraError",
    "PassRequiredError",
    "RecompileError",
    "StaleOutputError",
    "StepError",
    "__version__",
    "compile",
    "disabled",
    "eager",
    "explain",
    "profile",
    "register_op",
    "support_graph_compile",
]

#: Where the names that need torch live.
_LAZY = {
    "compile": "graphcap.compiler.frontend.api",
    "disabled": "graphcap.compiler.frontend.decorator",
    "eager": "graphcap.compiler.rules",
    "explain": "graphcap.compiler.debug.explain",
    "profile": "graphcap.compiler.debug.profile",
    "register_op": "graphcap.compiler.rules",
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
