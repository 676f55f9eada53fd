"""Boolean masks of attention become additive once, not in every layer.

``scaled_dot_product_attention`` turns a mask of ``True`` and ``False`` into one of ``0`` and ``-inf`` in the dtype of
the queries before it does anything else (``convert_boolean_attn_mask`` in ATen's ``attention.cpp``): three kernels, in
each layer anew. Cut out of its neighbours nobody can share or fuse them: 84 of 671 kernels and 140 of 2421 us of a
decode step of a 28-layer model (Qwen3 0.6B-like with a static cache, batch 8, on an H200 with torch 2.11). So the graph
does the same where the mask is made, inside of a compiled piece. What attention computes from it is the same to the
bit (:mod:`graphcap.compiler.private.attention` knows what it puts where the mask is false).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphcap.compiler import nodes, private

_ATTENTION = (
    torch.nn.functional.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
)
_POSITION = 3  #: of ``attn_mask`` among the arguments

#: Operators of Python that only read; others are known by their names in ATen.
_READING = (operator.and_, operator.or_, operator.xor, operator.invert, operator.getitem, operator.eq, operator.ne)


def make_masks_additive(graph: fx.Graph) -> None:
    """Give every attention with a boolean mask the additive one, which is computed right after the boolean one.

    Left alone where something in the graph may write into the mask.
    """
    masks = {n: mask for n in graph.nodes if n.target in _ATTENTION and (mask := _boolean_mask(n)) is not None}
    only_read = {mask for mask in dict.fromkeys(masks.values()) if _is_only_read(mask, graph)}
    additive: dict[tuple[fx.Node, torch.dtype, float], fx.Node] = {}
    for node, mask in masks.items():
        if mask not in only_read:
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), nodes.value_of)
        args = [*args] or [kwargs.pop("query")]
        forbidden = private.forbidden_score(args, kwargs)
        if forbidden is not None:
            key = mask, args[0].dtype, forbidden
            if key not in additive:
                additive[key] = _additive(*key, graph)
            _replace_mask(node, additive[key])


def _boolean_mask(node: fx.Node) -> fx.Node | None:
    mask = node.args[_POSITION] if len(node.args) > _POSITION else node.kwargs.get("attn_mask")
    value = nodes.value_of(mask) if isinstance(mask, fx.Node) else None
    if not isinstance(mask, fx.Node) or not isinstance(value, Tensor) or value.dtype is not torch.bool:
        return None
    return mask if value.layout is torch.strided and private.is_plain_tensor(value) else None


def _replace_mask(node: fx.Node, mask: fx.Node) -> None:
    if len(node.args) > _POSITION:
        node.update_arg(_POSITION, mask)
    else:
        node.update_kwarg("attn_mask", mask)


def _is_only_read(mask: fx.Node, graph: fx.Graph) -> bool:
    """Whether no call that gets the mask, or a tensor that shares its memory, can write into it."""
    storage = private.storage_id(nodes.value_of(mask))
    sharing = [node for node in graph.nodes if any(private.storage_id(each) == storage for each in _tensors(node))]
    return all(user.op == "output" or _only_reads(user) for node in sharing for user in node.users)


def _tensors(node: fx.Node) -> Sequence[Tensor]:
    return [each for each in nodes.tensors_of(node) if each.layout is torch.strided]


def _only_reads(node: fx.Node) -> bool:
    if node.target in _ATTENTION or node.target in _READING:
        return True
    target: Any = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    is_torch = node.op == "call_method" or getattr(torch, name, None) is target
    return is_torch and not name.endswith("_") and hasattr(torch.ops.aten, name) and "out" not in node.kwargs


def _additive(mask: fx.Node, dtype: torch.dtype, forbidden: float, graph: fx.Graph) -> fx.Node:
    """0 where the mask is true, another number elsewhere."""
    behind = mask if mask.op != "placeholder" else [n for n in graph.nodes if n.op == "placeholder"][-1]
    with graph.inserting_after(behind):
        made = graph.call_function(torch.where, (mask, 0.0, forbidden))
    with graph.inserting_after(made):
        cast = graph.call_method("to", (made, dtype))
    value = nodes.value_of(mask)
    with torch.no_grad(), private.as_dynamo_traces(private.fake_mode_of([value])):
        wide = torch.where(value, 0.0, forbidden)
        values = wide, wide.to(dtype)
    for node, each in zip((made, cast), values, strict=True):
        node.meta = {**mask.meta, "example_value": each}
    return cast
