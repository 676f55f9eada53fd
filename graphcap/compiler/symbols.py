"""Shape analysis: which sizes are part of the graph key, and which nodes depend on a size that is not.

A CUDA graph is good for one set of sizes. Sizes that take few values (a batch) belong into the key. A size that is
another one on every call (the length of a KV cache that grows by ``torch.cat``) does not: whatever touches it runs
live, and everything else stays capturable.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from graphcap.compiler import nodes, private
from graphcap.compiler.inputs import input_name


@dataclass(frozen=True)
class SizeSymbols:
    """The symbols of a graph.

    Attributes:
        key: the symbols that a graph key holds.
        live: the symbols outside the key, each with the reason.
        bound_by: for each symbol the placeholder that carries its value.
    """

    key: frozenset[Any]
    live: dict[Any, str]
    bound_by: dict[Any, fx.Node] = field(repr=False)

    def outside_key(self, node: fx.Node) -> str | None:
        """Why a node depends on something that the key does not fix, or ``None``."""
        for symbol in sorted(symbols_of_node(node), key=str):
            if symbol in self.live:
                return f"depends on {symbol}: {self.live[symbol]}"
            if symbol not in self.key:
                return f"depends on {symbol}, which is known only after other operations ran"
        return None


def symbols_in(values: Iterable[Any]) -> list[Any]:
    """The free symbols in shapes and strides of tensors and in symbolic scalars, in order of first mention.

    Storage offsets do not count. Compiled code reads a tensor from its first element, wherever that lies, so a slice
    that moves along a larger tensor (``tokens[:, n : n + 1]``) is the same input on every call.
    """
    found: dict[Any, None] = {}
    for leaf in nodes.leaves(list(values)):
        sizes = (*leaf.shape, *leaf.stride()) if isinstance(leaf, torch.Tensor) else (leaf,)
        for size in sizes:
            expression = private.symbol_expression(size)
            if expression is not None:
                found.update(dict.fromkeys(sorted(expression.free_symbols, key=str)))
    return list(found)


def symbols_of_node(node: fx.Node) -> list[Any]:
    """The symbols that a node's result or any of its arguments carries."""
    return symbols_in([nodes.value_of(node), *(nodes.value_of(arg) for arg in node.all_input_nodes)])


def analyse_sizes(graph: fx.Graph) -> SizeSymbols:
    """Sort the symbols of a Dynamo graph into the key and outside of it.

    Outside are floats that change between calls, and sizes that *grow*: the graph returns a tensor that is longer along
    a size than the one it was given, so the caller's next call will bring another value; and sizes that keep pace. So
    are numbers that grow: the tokens that a cache has seen.
    """
    bound_by: dict[Any, fx.Node] = {}
    live: dict[Any, str] = {}
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        expression = private.symbol_expression(nodes.value_of(node))
        if expression is not None and expression.is_symbol:
            bound_by.setdefault(expression, node)
            if isinstance(nodes.value_of(node), torch.SymFloat):
                live[expression] = "a float that changes between calls"
    growing = _growing_symbols(graph)
    live.update(growing)
    live.update(_growing_numbers(graph, bound_by))
    live.update(_symbols_keeping_pace(graph, growing))
    matters = set(symbols_in(nodes.value_of(node) for node in graph.nodes if node.users and not _is_size(node)))
    matters.update(s for s, node in bound_by.items() if node.users)
    return SizeSymbols(frozenset(s for s in bound_by if s in matters and s not in live), live, bound_by)


def _is_size(node: fx.Node) -> bool:
    """A placeholder that carries a size or an offset of another input; alone it decides nothing."""
    return node.op == "placeholder" and not nodes.tensors_of(node)


def _growing_symbols(graph: fx.Graph) -> dict[Any, str]:
    """Symbols ``s`` of an input size where an output of the same other sizes has ``s + something`` in its place."""
    taken: dict[tuple[Any, ...], str] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            for tensor in nodes.tensors_of(node):
                for dim, symbol in _symbolic_dims(tensor):
                    if symbol.is_symbol:
                        name = input_name(node)
                        taken.setdefault((symbol, *_frame(tensor, dim)), f"{name} dim {dim}")
    growing: dict[Any, str] = {}
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    for node in output.all_input_nodes:
        for tensor in nodes.tensors_of(node):
            for dim, expression in _symbolic_dims(tensor):
                for symbol in expression.free_symbols:
                    where = taken.get((symbol, *_frame(tensor, dim)))
                    if where is not None and _longer_by(expression, symbol):
                        growing[symbol] = f"{where} grows with every call ({symbol} in, {expression} out)"
    return growing


def _growing_numbers(graph: fx.Graph, bound_by: Mapping[Any, fx.Node]) -> dict[Any, str]:
    """Symbols of a Python number, and of no size, where the graph returns that number plus something."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    sizes = set(symbols_in(tensor for node in inputs for tensor in nodes.tensors_of(node)))
    growing: dict[Any, str] = {}
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    for node in output.all_input_nodes:
        expression = None if nodes.tensors_of(node) else private.symbol_expression(nodes.value_of(node))
        for symbol in expression.free_symbols if expression is not None else ():
            if symbol in bound_by and symbol not in sizes and _longer_by(expression, symbol):
                name = input_name(bound_by[symbol])
                growing[symbol] = f"{name} grows with every call ({symbol} in, {expression} out)"
    return growing


def _symbols_keeping_pace(graph: fx.Graph, growing: Mapping[Any, str]) -> dict[Any, str]:
    """Symbols of an input that is as long as a grown output and does not grow itself: the mask beside a KV cache.

    The caller makes it longer for every call, and nothing in the graph says so: equal lengths at trace time are all
    there is to go by. A batch that happens to have that length is a size of the cache too, and so is told apart.
    """
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    lengths = {
        private.size_hint(tensor.shape[dim])
        for node in output.all_input_nodes
        for tensor in nodes.tensors_of(node)
        for dim, expression in _symbolic_dims(tensor)
        if not expression.is_symbol and not expression.free_symbols.isdisjoint(growing)
    }
    inputs = [(node, tensor) for node in graph.nodes if node.op == "placeholder" for tensor in nodes.tensors_of(node)]
    sizes_of_caches = {
        other
        for _, tensor in inputs
        if any(symbol in growing for _, symbol in _symbolic_dims(tensor))
        for _, other in _symbolic_dims(tensor)
    }
    pace: dict[Any, str] = {}
    for node, tensor in inputs:
        for dim, symbol in _symbolic_dims(tensor):
            if not symbol.is_symbol or symbol in sizes_of_caches or private.is_unbacked(symbol):
                continue
            if private.size_hint(tensor.shape[dim]) in lengths:
                name = input_name(node)
                pace[symbol] = f"{name} dim {dim} is as long as a cache that grows with every call"
    return pace


def _frame(tensor: torch.Tensor, dim: int) -> tuple[Any, ...]:
    """A tensor's form without one size: a cache that grew has the form of the cache, a mask of that length has not."""
    others = tuple(str(size) for index, size in enumerate(tensor.shape) if index != dim)
    return tensor.dtype, dim, others


def _longer_by(expression: Any, symbol: Any) -> bool:
    """Whether a size is ``symbol`` plus something of its own; a batch that is doubled is not fed back."""
    difference = expression - symbol
    return bool(difference.is_positive) and symbol not in difference.free_symbols


def _symbolic_dims(tensor: torch.Tensor) -> list[tuple[int, Any]]:
    dims = ((dim, private.symbol_expression(size)) for dim, size in enumerate(tensor.shape))
    return [(dim, expression) for dim, expression in dims if expression is not None and not expression.is_number]
