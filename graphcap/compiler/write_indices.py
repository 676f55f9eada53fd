"""Which inputs say where something is written: a padded row of theirs must not point at a real one."""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from graphcap.compiler import nodes, private

#: Operations that write where an integer argument says, in place or into a copy.
SCATTERS = ("index_put", "index_copy", "index_add", "index_fill", "scatter", "masked_scatter", "put")


def write_index_inputs(graph: fx.Graph, writing: Collection[fx.Node]) -> set[fx.Node]:
    """The integer placeholders whose values reach, through integer results, an operation that writes by index.

    An operation that writes an argument in an unknown way (a custom op with ``mutates_args``, an ``@graphcap.eager``
    function) may take any integer tensor for an index.

    Args:
        graph: a Dynamo graph.
        writing: the nodes of pieces that write into what they are given.
    """
    queue = [index for node in graph.nodes for index in _indices_of(node, node in writing)]
    seen: set[fx.Node] = set()
    while queue:
        node = queue.pop()
        if node not in seen and nodes.is_integer(node):
            seen.add(node)
            queue += node.all_input_nodes
    return {node for node in seen if node.op == "placeholder"}


def _indices_of(node: fx.Node, in_writing_piece: bool) -> list[fx.Node]:
    if not node.op.startswith("call_"):
        return []
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    plain = name.partition(".")[0].strip("_")
    if node.target is operator.setitem:
        return [each for each in nodes.leaves(node.args[1]) if isinstance(each, fx.Node)]
    known = hasattr(torch.ops.aten, plain) or hasattr(torch.ops.aten, f"{plain}_")
    if known and any(plain.startswith(each) for each in SCATTERS):
        return node.all_input_nodes[1:]
    return list(node.all_input_nodes) if _writes_somewhere(node.target, in_writing_piece) else []


def _writes_somewhere(target: Any, in_writing_piece: bool) -> bool:
    if hasattr(target, "_graphcap_eager"):
        return in_writing_piece or target._graphcap_fake is not None  # nobody has seen what a function with a fake does
    op = private.resolve_op_overload(target)
    if not isinstance(op, torch._ops.OpOverload) or op.namespace in ("aten", "prims", "prim"):
        return False
    return any(each.alias_info is not None and each.alias_info.is_write for each in op._schema.arguments)
