"""The sizes of a graph as the graph runtime reads them: affine in one symbol each, with the names that users gave.

Dynamo may give two dims of one declared name a symbol each. A name is a promise that they are equal, so the runtime
sees one: the symbol of the first dim of that name. ``"num_reqs+1"`` follows the symbol of ``"num_reqs"`` likewise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from graphcap.compiler import nodes, private
from graphcap.compiler.frontend.dims import DEFAULT_NAME, DynamicDim, parse
from graphcap.compiler.inputs import input_name
from graphcap.compiler.symbols import symbols_in
from graphcap.cudagraph import DimSize, Size


@dataclass(frozen=True)
class GraphDims:
    """The dims of one graph.

    Attributes:
        names: per placeholder the declared dims of its tensor, ``{dim: name}``; of ``"num_reqs+1"`` that is
            ``"num_reqs"``.
        largest: the symbols of dims declared with a ``max``, each with it.
        equal: symbols that a declaration expresses through another one.
    """

    names: Mapping[fx.Node, Mapping[int, str]] = field(default_factory=dict)
    largest: Mapping[str, int] = field(default_factory=dict)
    equal: Mapping[Any, Any] = field(default_factory=dict)

    def size(self, value: int | torch.SymInt) -> DimSize:
        """A size as the runtime reads it, right for symbols of at least 1 (nothing smaller is ever padded)."""
        expression = private.symbol_expression(value)
        if expression is None or expression.is_number:
            return int(value)
        return _affine(expression.xreplace(dict(self.equal)))

    def sizes(self, value: Any) -> tuple[DimSize, ...]:
        """Of a tensor per dim; of an int the one that it is; empty for anything else."""
        if isinstance(value, torch.Tensor):
            return tuple(map(self.size, value.shape))
        return (self.size(value),) if isinstance(value, torch.SymInt) else ()

    def strides(self, value: Any) -> tuple[DimSize, ...]:
        """Of a strided tensor per dim; empty for anything else."""
        strided = isinstance(value, torch.Tensor) and value.layout is torch.strided
        return tuple(map(self.size, value.stride())) if strided else ()

    def text(self, expression: Any) -> str:
        """A symbol or expression as the runtime knows it."""
        return str(expression.xreplace(dict(self.equal)))

    def symbols(self, values: Iterable[Any]) -> frozenset[str]:
        """The names of all symbols in shapes, strides and numbers."""
        found = (symbol.xreplace(dict(self.equal)) for symbol in symbols_in(values))
        return frozenset(str(symbol) for expression in found for symbol in expression.free_symbols)


def read_dims(graph: fx.Graph, examples: Sequence[Any], declared: Mapping[str, Any] | None) -> GraphDims:
    """Find the declared dims of a graph's inputs.

    Args:
        graph: whose placeholders have names (:func:`graphcap.compiler.inputs.name_inputs`).
        examples: the first call's value of each placeholder.
        declared: as in ``Config.dynamic_arg_dims``; ``None`` takes what the user marked with ``mark_dynamic`` and
            ``mark_unbacked``.

    Raises:
        DimError: malformed.
    """
    placeholders = [node for node in graph.nodes if node.op == "placeholder" and nodes.tensors_of(node)]
    if declared is None:
        by_node = dict(zip(_placeholders(graph), examples, strict=True))
        found = _named_by_symbol([(node, dim) for node in placeholders for dim in private.marked_dims(by_node[node])])
    else:
        found = list(_matches(placeholders, parse(declared)))
    names: dict[fx.Node, dict[int, str]] = {}
    for node, dim in found:
        names.setdefault(node, {})[dim.dim] = dim.follows[0] if dim.follows else dim.name
    equal = _equal_symbols(found)
    dims = GraphDims(names, {}, equal)
    largest = {
        size.symbol: dim.max
        for node, dim in found
        if dim.max is not None and isinstance(size := dims.size(nodes.value_of(node).shape[dim.dim]), Size)
    }
    return GraphDims(names, largest, equal)


def _placeholders(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def _matches(placeholders: Sequence[fx.Node], dims: Sequence[DynamicDim]) -> Iterator[tuple[fx.Node, DynamicDim]]:
    """The inputs that a declared path means, each with its non-negative dim."""
    for node in placeholders:
        if private.source_name(node).startswith("L['self']"):
            continue  # a parameter may be called what an argument is called
        name, rank = input_name(node), nodes.value_of(node).dim()
        for dim in dims:
            path = dim.path.removeprefix("kwargs.").removeprefix("args.")
            if (name == path or name.startswith(f"{path}.")) and -rank <= dim.dim < rank:
                yield node, dim._replace(dim=dim.dim % rank)


def _named_by_symbol(marked: Sequence[tuple[fx.Node, int]]) -> list[tuple[fx.Node, DynamicDim]]:
    """Names for dims that were marked without one: dims of one symbol share a name."""
    expressions = {(node, dim): str(nodes.value_of(node).shape[dim]) for node, dim in marked}
    first: dict[str, str] = {}
    for (node, dim), expression in expressions.items():
        first.setdefault(expression, f"{input_name(node)}.{dim}")
    if len(first) == 1:
        first = dict.fromkeys(first, DEFAULT_NAME)
    return [(node, DynamicDim(input_name(node), dim, first[expressions[node, dim]])) for node, dim in marked]


def _equal_symbols(found: Sequence[tuple[fx.Node, DynamicDim]]) -> dict[Any, Any]:
    """The symbols of dims whose name, or the name that theirs follows, belongs to another symbol already."""
    base: dict[str, Any] = {}
    symbols = [(private.symbol_expression(nodes.value_of(node).shape[dim.dim]), dim) for node, dim in found]
    for symbol, dim in symbols:
        if symbol is not None and symbol.is_symbol and dim.follows is None:
            base.setdefault(dim.name, symbol)
    for symbol, dim in symbols:
        if symbol is not None and symbol.is_symbol and dim.follows is not None:
            base.setdefault(dim.follows[0], sympy.Symbol(f"_{dim.follows[0]}_", integer=True))  # no dim has that size
    equal: dict[Any, Any] = {}
    for symbol, dim in symbols:
        if symbol is None or not symbol.is_symbol:
            continue
        name, scale, offset = dim.follows or (dim.name, 1, 0)
        root = base.get(name)
        if root is not None and root not in equal and symbol not in (*base.values(), *equal, root):
            equal[symbol] = scale * root + offset
        elif root is not None and root != symbol and symbol not in equal and dim.follows is None:
            equal[symbol] = root
    return equal


def _affine(expression: Any) -> DimSize:
    """``scale * symbol + offset`` where the expression is that for symbols of at least 1, otherwise ``None``."""
    if expression.is_number:
        return int(expression)
    if len(expression.free_symbols) != 1:
        return None
    (symbol,) = expression.free_symbols
    above_one = sympy.Symbol("above_one", integer=True, nonnegative=True)
    shifted = sympy.expand(expression.xreplace({symbol: above_one + 1}))
    scale = shifted.coeff(above_one, 1)
    offset = sympy.expand(shifted - scale * above_one)
    if not (scale.is_Integer and offset.is_Integer):
        return None
    return Size(str(symbol), int(scale), int(offset - scale)) if scale else int(offset)
