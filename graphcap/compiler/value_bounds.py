"""Which integer inputs may hold other values than a call brings, and which values: for the proof that padding is right.

The values of ids end in a table, those of masks and positions in arithmetic. Such inputs can be given any values that
the table has rows for. What an operation of unknown meaning sees, such as the block table of an attention kernel, may
be a place in memory, and is left alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphcap.compiler import nodes
from graphcap.compiler.rules import op_name
from graphcap.cudagraph import ANY


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: Operations whose integer results hold values of their argument.
SAME = _names(
    "alias cat chunk clone concat contiguous detach expand expand_as flatten flip getitem int lift_fresh_copy long"
    " movedim narrow permute ravel repeat reshape roll select select_int slice split split_with_sizes squeeze stack"
    " swapaxes t to tensor_split transpose type unbind unflatten unsafe_view unsqueeze view view_as"
)
#: Operations that calculate with values, whatever these are.
ARITHMETIC = _names(
    "abs add all amax amin and and_ any argmax argmin argsort bfloat16 bitwise_and bitwise_not bitwise_or"
    " bitwise_xor bool clamp clamp_max clamp_min clip cos cumsum div double eq exp fill float floor_divide floordiv"
    " full_like ge gt half invert isin le log logical_and logical_not logical_or logical_xor lt masked_fill max"
    " maximum mean min minimum mod mul ne neg not not_ or or_ pow prod remainder rsub scaled_dot_product_attention"
    " sign sin softmax sort sqrt sub sum topk tril triu truediv where xor"
)
#: Those that only tell whether values are the same, which is no reason to keep to small ones.
EQUALITY = _names("eq ne isin")
#: Operations that take from a dim, their second argument, what an index tells, their third.
BY_INDEX = _names("gather index_select take_along_dim")
#: What is not about values.
METADATA = _names(
    "dim empty_like getattr is_contiguous ndim new_empty new_ones new_zeros numel ones_like size stride sym_numel"
    " sym_size sym_storage_offset sym_stride zeros_like"
)


def value_bounds(graph: fx.Graph) -> dict[fx.Node, int]:
    """The integer and bool placeholders with values that may be made up, each with the bound below which they are good:
    that of the smallest table that they index, or :data:`~graphcap.cudagraph.ANY` where they are calculated with too.

    Args:
        graph: a Dynamo graph.
    """
    inputs = [node for node in graph.nodes if node.op == "placeholder" and nodes.is_integer(node)]
    return {node: bound for node in inputs if (bound := _bound(node)) is not None}


def _bound(given: fx.Node) -> int | None:
    is_calculated, bound, queue, seen = False, ANY, [(given, True, False)], set[tuple[fx.Node, bool, bool]]()
    while queue:
        node, is_same, is_flag = queue.pop()
        for user in node.users:
            at = _rows_indexed(user, node)
            if at is not None:
                if not is_same or at == 0:
                    return None
                bound = min(bound, at)
                continue
            name = plain_name(op_name(user.target)) if user.op.startswith("call_") else ""
            if user.op == "output" or name in METADATA:
                continue
            if (name not in SAME and name not in ARITHMETIC) or (name == "where" and len(user.args) == 1):
                return None
            is_calculated |= name in ARITHMETIC and name not in EQUALITY and not is_flag
            further = user, is_same and name in SAME, is_flag or name in EQUALITY
            if further not in seen and nodes.is_integer(user):
                seen.add(further)
                queue.append(further)
    return ANY if is_calculated else bound


def plain_name(name: str) -> str:
    """Of an operation of torch or Python: ``"add"`` of ``"aten::add"``, ``"torch.add"`` and ``"_operator.add"``. ``""``
    of anybody else's. Operations in place keep a name of their own, which is in none of the lists."""
    module, _, plain = name.replace("aten::", "aten.").rpartition(".")
    if module.split(".")[0] not in ("", "aten", "torch", "_operator"):
        return ""
    return plain.removeprefix("__").removesuffix("__")


def _rows_indexed(user: fx.Node, index: fx.Node) -> int | None:
    """How many rows the table has that ``user`` indexes with ``index``, 0 where that is not known; ``None`` where it is
    no such operation."""
    if not user.op.startswith("call_"):
        return None
    name, dim = plain_name(op_name(user.target)), 0
    table: Any = user.args[0] if user.args else None
    if name == "embedding":
        weights = [each for each in user.all_input_nodes if each is not index]
        table = weights[0] if len(weights) == 1 else None
    elif name in BY_INDEX:
        at: Any = user.args[1] if len(user.args) > 1 else user.kwargs.get("dim")
        if type(at) is not int:
            return 0
        dim = at
    elif name != "getitem" or index not in nodes.leaves(user.args[1:]):
        return None
    elif user.args[1] is not index:
        return 0
    if not isinstance(table, fx.Node) or table is index or _is_flags(index):
        return 0
    return rows_of(nodes.value_of(table), dim)


def rows_of(table: Any, dim: int) -> int:
    """How many rows a table has in a dim, 0 where that depends on the call."""
    if not isinstance(table, torch.Tensor) or not -table.dim() <= dim < table.dim():
        return 0
    size = table.shape[dim]
    return size if type(size) is int else 0


def _is_flags(index: fx.Node) -> bool:
    return any(each.dtype is torch.bool for each in nodes.tensors_of(index))
