"""What a ``repro.py`` gives to its piece: a random tensor for each placeholder that is one, sizes read off those."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphcap.compiler import nodes, private
from graphcap.compiler.debug.graph_source import NotReproducible, tensor_literal
from graphcap.compiler.write_indices import write_index_inputs

#: Dtypes of tensors that index another one.
_INDEX_DTYPES = (torch.int64, torch.int32)


@dataclass
class Input:
    """One placeholder.

    Attributes:
        name: of the placeholder.
        literal: how it is made.
        dynamic: its dims that were symbolic.
        carrier: for a size that some tensor has, that tensor and its dim.
    """

    name: str
    literal: str
    dynamic: tuple[int, ...] = ()
    carrier: tuple[str, int] | None = None

    @property
    def is_made(self) -> bool:
        """Whether ``make_inputs`` makes it; others are read off those that are made."""
        return self.carrier is None


def inputs_of(module: fx.GraphModule) -> list[Input]:
    """One for each placeholder.

    Raises:
        NotReproducible: one that cannot be written as Python source.
    """
    placeholders = _placeholders(module)
    carriers, indices = _carriers(placeholders), write_index_inputs(module.graph, ())
    return [_input(str(node.target), nodes.value_of(node), carriers, node in indices) for node in placeholders]


def arguments(inputs: Sequence[Input]) -> str:
    """What ``call`` hands to the piece: its ``x`` in order, and sizes of them."""
    made = [each.name for each in inputs if each.is_made]
    return "*x" if len(made) == len(inputs) else ", ".join(_argument(each, made) for each in inputs)


def sizes_used(module: fx.GraphModule) -> str:
    """``"s77 = 7, s21 = 12"``."""
    found: dict[str, int] = {}
    for node in _placeholders(module):
        value = nodes.value_of(node)
        for size in value.shape if isinstance(value, torch.Tensor) else (value,):
            if isinstance(size, torch.SymInt):
                found[str(private.symbol_expression(size))] = private.size_hint(size)
    return ", ".join(f"{symbol} = {value}" for symbol, value in sorted(found.items()))


def is_literal(value: Any) -> bool:
    """Whether ``repr(value)`` is Python source for it."""
    try:
        return bool(ast.literal_eval(repr(value)) == value)
    except (ValueError, SyntaxError):
        return False


def _placeholders(module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in module.graph.nodes if node.op == "placeholder"]


def _carriers(placeholders: Sequence[fx.Node]) -> dict[Any, tuple[str, int]]:
    """For each symbol the name and dim of a tensor that has this size."""
    found: dict[Any, tuple[str, int]] = {}
    for node in placeholders:
        value = nodes.value_of(node)
        if isinstance(value, torch.Tensor):
            for dim, size in enumerate(value.shape):
                expression = private.symbol_expression(size)
                if expression is not None and expression.is_symbol:
                    found.setdefault(expression, (str(node.target), dim))
    return found


def _argument(each: Input, made: Sequence[str]) -> str:
    if each.carrier is not None:
        name, dim = each.carrier
        return f"x[{made.index(name)}].size({dim})"
    return f"x[{made.index(each.name)}]"


def _input(name: str, value: Any, carriers: dict[Any, tuple[str, int]], is_write_index: bool) -> Input:
    if isinstance(value, torch.Tensor):
        symbolic = tuple(d for d, size in enumerate(value.shape) if private.symbol_expression(size) is not None)
        is_order = is_write_index and value.dim() == 1 and value.dtype in _INDEX_DTYPES
        literal = tensor_literal(value)
        return Input(name, f"distinct({literal})" if is_order else literal, symbolic)
    if isinstance(value, torch.SymFloat):
        return Input(name, "0.5")  # a float that changes between calls has no value that is worth recording
    expression = private.symbol_expression(value)
    if expression is not None:
        return Input(name, str(private.size_hint(value)), carrier=carriers.get(expression))
    if is_literal(value):
        return Input(name, repr(value))
    raise NotReproducible(f"input {name} is a {type(value).__name__}")
