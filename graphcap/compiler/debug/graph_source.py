"""A graph module as Python source that needs no graph: classes, the constants they hold, the imports they need."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import fx

from graphcap.compiler import private
from graphcap.compiler.rules import op_name

#: A constant tensor of more elements than this is replaced by random values.
MAX_LITERAL_ELEMENTS = 1024


class NotReproducible(Exception):
    """A piece holds something that has no Python source; the message says what."""


def class_sources(module: fx.GraphModule, name: str, imports: dict[str, None]) -> Iterator[str]:
    """The source of a graph module, after that of the graph modules that it calls."""
    lines = []
    for node in module.graph.nodes:
        if node.op != "get_attr":
            continue
        attribute = getattr(module, str(node.target), None)
        if isinstance(attribute, fx.GraphModule):
            inner = f"{name}_{node.target}"
            yield from class_sources(attribute, inner, imports)
            lines.append(f"self.{node.target} = {inner}()")
        elif isinstance(attribute, torch.Tensor):
            imports.setdefault("from math import inf, nan")
            lines.append(f"self.{node.target} = {_constant(attribute)}")
        else:
            raise NotReproducible(f"attribute {node.target} is a {type(attribute).__name__}")
    code = module.graph.python_code("self")
    used = {name: value for name, value in code.globals.items() if re.search(rf"\b{re.escape(name)}\b", code.src)}
    for line in _imports(used):
        imports.setdefault(line)
    body = "\n".join(f"    {line}".rstrip() for line in code.src.strip().splitlines())
    parts = [f"class {name}(torch.nn.Module):"]
    if lines:
        body_lines = ["super().__init__()", *dict.fromkeys(lines)]
        parts += ["    def __init__(self):", *(f"        {line}" for line in body_lines), ""]
    yield "\n".join([*parts, body])


def _constant(value: torch.Tensor) -> str:
    if value.numel() > MAX_LITERAL_ELEMENTS:
        return f"{tensor_literal(value)}  # a large constant: random here"
    return f"torch.tensor({value.tolist()!r}, dtype={value.dtype}, device={str(value.device)!r})"


def _imports(names: dict[str, Any]) -> Iterator[str]:
    """Import lines for the global names that generated graph code uses."""
    for name, value in sorted(names.items()):
        if value is torch:
            continue
        if isinstance(value, ModuleType):
            yield f"import {value.__name__}" if value.__name__ == name else f"import {value.__name__} as {name}"
        elif value is type(None):
            yield "NoneType = type(None)"
        elif isinstance(value, float):
            yield f"{name} = float({str(value)!r})"  # inf and nan
        else:
            yield _import_object(name, value)


def _import_object(name: str, value: Any) -> str:
    home, qualified = getattr(value, "__module__", None), getattr(value, "__qualname__", "")
    if not home or home == "__main__" or not qualified.isidentifier():
        raise NotReproducible(f"it calls {op_name(value)}, which no module exports")
    return f"from {home} import {qualified} as {name}" if qualified != name else f"from {home} import {name}"


def tensor_literal(value: torch.Tensor) -> str:
    """A call of :func:`graphcap.compiler.debug.compare.tensor` that makes a tensor of this layout.

    Raises:
        NotReproducible: for a layout without strides.
    """
    if value.layout is not torch.strided:
        raise NotReproducible(f"an input has layout {value.layout}")
    shape, stride = tuple(map(private.size_hint, value.shape)), tuple(map(private.size_hint, value.stride()))
    offset = private.size_hint(value.storage_offset())
    facts = [repr(shape), repr(stride), str(value.dtype), repr(str(value.device))] + ([str(offset)] if offset else [])
    return f"tensor({', '.join(facts)})"
