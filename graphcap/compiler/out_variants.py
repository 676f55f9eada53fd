"""A piece that runs live between graphs, writing its result straight to where the next graph reads it.

An operator that makes a new tensor has that copied to a fixed address on every call. Where it has an ``out`` overload
of the same arguments (as most of ATen's have, and as custom ops may: ``attend.out(..., *, Tensor(a!) out)``), that one
is called with the memory itself. Its result must have a size that the graph key fixes: PyTorch would give a tensor of
another size other memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from graphcap.compiler import nodes, private


def out_function(piece: fx.GraphModule) -> Callable[..., Any] | None:
    """The piece as a function of the tensor for its result and then its inputs, positionally; it returns nothing.

    ``None`` for anything but one operator with one result, a plain tensor, and an ``out`` overload.
    """
    calls = [node for node in piece.graph.nodes if node.op not in ("placeholder", "output")]
    returned = next(node for node in reversed(piece.graph.nodes) if node.op == "output").args[0]
    if len(calls) != 1 or calls[0].op != "call_function" or tuple(returned) != (calls[0],):
        return None
    found = private.out_overload(calls[0].target, calls[0].kwargs.keys())
    if found is None or not all(map(private.is_plain_tensor, nodes.tensors_of(calls[0]))):
        return None
    overload, name = found
    graph = fx.Graph()
    out = graph.placeholder("out")
    copies: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(piece.graph, copies)
    call = copies[calls[0]]
    call.target, call.kwargs = overload, {**call.kwargs, name: out}
    graph.output(())
    forward: Callable[..., Any] = fx.GraphModule(piece, graph, class_name="live_out").forward
    return forward
