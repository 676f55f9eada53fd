"""Bring a Dynamo graph into the form that the other modules expect, with nothing that has an effect moved."""

from __future__ import annotations

import operator

import torch
from torch import fx

from graphcap.compiler import nodes, private
from graphcap.compiler.rules import never_captured
from graphcap.compiler.symbols import SizeSymbols

#: Calls that torch's own modules leave in a graph and that compute nothing.
_NO_OPS = {"_log_api_usage_once"}

#: Questions about a tensor's layout. They read no data.
_SIZE_QUERIES = {"size", "stride", "numel", "dim", "storage_offset", "sym_size", "sym_stride", "sym_numel"}


def normalise(graph: fx.Graph, sizes: SizeSymbols) -> None:
    """Take every ``torch.Size`` apart; put every ``getitem`` of a tuple right behind the tuple; erase no-ops; read
    sizes from the inputs, not from tensors.

    Everything that may have an effect stays where it is.
    """
    for node in list(graph.nodes):
        if node.op == "call_method" and node.target == "size" and isinstance(nodes.value_of(node), torch.Size):
            _take_apart(node)
    for node in list(graph.nodes):
        if isinstance(nodes.value_of(node), (tuple, list)):
            for user in reversed(list(node.users)):
                if user.target is operator.getitem:
                    node.append(user)
    for node in graph.nodes:
        itself = _returned_argument(node)
        if itself is not None:
            node.replace_all_uses_with(itself)
    for node in reversed(list(graph.nodes)):
        known = _known_size(node, sizes)
        if known is not None:
            node.replace_all_uses_with(known) if isinstance(known, fx.Node) else _inline(node, known)
        no_op = nodes.is_pure_scalar(node) or _is_size_query(node) or getattr(node.target, "__name__", "") in _NO_OPS
        if not node.users and no_op:
            graph.erase_node(node)


def _take_apart(node: fx.Node) -> None:
    """``x.size()`` becomes ``(x.size(0), x.size(1))``: between pieces numbers may cross, a ``torch.Size`` may not, as
    Inductor compiles no piece that returns one."""
    whole, parts = nodes.value_of(node), list[fx.Node]()
    for dim in reversed(range(len(whole))):
        with node.graph.inserting_after(node):
            part = node.graph.call_method("size", (*node.args, dim))
        part.meta = {**node.meta, "example_value": whole[dim]}
        parts.insert(0, part)
    for user in list(node.users):
        index = user.args[1] if user.target is operator.getitem else None
        if isinstance(index, int):
            user.replace_all_uses_with(parts[index])
            node.graph.erase_node(user)
        elif user.op != "output" and not (user.op == "call_method" and user.args[0] is node):  # its methods need a Size
            user.args = fx.map_arg(user.args, lambda each: tuple(parts) if each is node else each)
            user.kwargs = fx.map_arg(user.kwargs, lambda each: tuple(parts) if each is node else each)


def _returned_argument(node: fx.Node) -> fx.Node | None:
    """The argument that a torch function returns itself (``x.add_(1)``): one tensor under two names enters no piece."""
    value = nodes.value_of(node)
    if not isinstance(value, torch.Tensor) or not node.op.startswith("call_") or never_captured(node):
        return None
    return next((argument for argument in node.all_input_nodes if nodes.value_of(argument) is value), None)


def _is_size_query(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", node.target) in _SIZE_QUERIES and nodes.is_scalar(node)


def _known_size(node: fx.Node, sizes: SizeSymbols) -> fx.Node | int | None:
    """What ``x.size(0)`` comes to without ``x``: an input of the graph, or a number."""
    value = nodes.value_of(node)
    if not _is_size_query(node) or isinstance(value, (tuple, list)):
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return sizes.bound_by.get(private.symbol_expression(value))


def _inline(node: fx.Node, value: int) -> None:
    for user in list(node.users):
        user.args = fx.map_arg(user.args, lambda a: value if a is node else a)
        user.kwargs = fx.map_arg(user.kwargs, lambda a: value if a is node else a)
