"""A piece that runs live between graphs, writing its result straight to where the next graph reads it.

An operator that makes a new tensor has that copied to a fixed address on every call. Where it has an ``out`` overload
of the same arguments (as most of ATen's have, and as custom ops may: ``attend.out(..., *, Tensor(a!) out)``), that one
is called with the memory itself. Its result must have a size that the graph key fixes: PyTorch would give a tensor of
another size other memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from graphcap.compiler import nodes, private

_UNKNOWN_SIZE = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}


def out_function(piece: fx.GraphModule) -> Callable[..., Any] | None:
    """The piece as a function of the tensor for its result and then its inputs, positionally; it returns nothing.

    ``None`` for anything but one operator with one result, a plain tensor, and an ``out`` overload.
    """
    calls = [node for node in piece.graph.nodes if node.op not in ("placeholder", "output")]
    returned = next(node for node in reversed(piece.graph.nodes) if node.op == "output").args[0]
    if len(calls) != 1 or calls[0].op != "call_function" or tuple(returned) != (calls[0],):
        return None
    found = _out_overload(calls[0])
    if found is None or not all(map(private.is_plain_tensor, nodes.tensors_of(calls[0]))):
        return None
    overload, name = found
    graph = fx.Graph()
    out = graph.placeholder("out")
    copies: dict[fx.Node, fx.Node] = {}
    for node in piece.graph.nodes:
        if node.op != "output":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    call = copies[calls[0]]
    call.target, call.kwargs = overload, {**call.kwargs, name: out}
    graph.output(())
    forward: Callable[..., Any] = fx.GraphModule(piece, graph, class_name="live_out").forward
    return forward


def _out_overload(call: fx.Node) -> tuple[torch._ops.OpOverload, str] | None:
    """The overload that differs only in the tensor that it writes its result to, and the name of that argument."""
    target: Any = call.target
    overloads = _overloads(target)
    written = {op: [a for a in op._schema.arguments if a.alias_info and a.alias_info.is_write] for op in overloads}
    into = {op: args[0].name for op, args in written.items() if len(args) == 1 and args[0].kwarg_only}
    if not isinstance(target, torch._ops.OpOverload):  # a packet: the overload beside those with ``out``, if it is one
        others = [op for op in overloads if op not in into and not set(into.values()) & call.kwargs.keys()]
        target = others[0] if len(others) == 1 else None
    if target is None or target in into or _UNKNOWN_SIZE & set(target.tags) or not _makes_a_tensor(target):
        return None
    wanted = _named(target._schema.arguments)
    for op, name in into.items():
        if _named(each for each in op._schema.arguments if each.name != name) == wanted:
            return op, name
    return None


def _overloads(target: object) -> list[torch._ops.OpOverload]:
    packet = target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return []
    return [getattr(packet, name) for name in packet.overloads()]


def _makes_a_tensor(op: torch._ops.OpOverload) -> bool:
    """Whether it returns one, and neither returns nor writes an argument."""
    values = [*op._schema.arguments, *op._schema.returns]
    is_new = all(each.alias_info is None for each in values)
    return is_new and [str(each.type) for each in op._schema.returns] == ["Tensor"]


def _named(arguments: Iterable[Any]) -> list[tuple[str, str]]:
    return [(each.name, str(each.type)) for each in arguments]
