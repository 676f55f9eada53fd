"""Whether two recordings agree: of two calls of one size in everything, of two sizes in all but the sizes.

What a size may change is what an operator's schema calls one (``SymInt``). Any other number (a factor, the end of an
``arange``) could be a counter as well as a size: it must be the same, so such functions agree at one size only.
"""

from __future__ import annotations

import functools
import re
from typing import Any, Protocol

import torch

from graphcap.compiler import private
from graphcap.compiler.breakable.calls import Call, Kind, Ref, Value, Weak
from graphcap.compiler.breakable.key import same_leaf
from graphcap.compiler.rules import op_name

_SIZE = re.compile(r"\bSymInt(?:\[\d*\])?\??\s+(\w+)")


class Recorded(Protocol):
    """What a recording holds; see :class:`graphcap.compiler.breakable.record.Recorder`."""

    calls: list[Call]
    outputs: list[tuple[int, int]]

    @property
    def values(self) -> list[Value]:
        """By number."""


def difference(a: Recorded, b: Recorded, *, same_size: bool = True) -> str:
    """Where two recordings part, in one line; ``""`` where one could stand for the other.

    Values that were made of Python numbers must have equal bits, those from outside must be the same tensor.

    Args:
        a: the earlier one.
        b: the later one.
        same_size: whether the calls had equal sizes. Otherwise sizes may differ.
    """
    for first, second in zip(a.calls, b.calls, strict=False):
        if first.function is not second.function:
            return f"{_name(first)} at {first.origin} in one call, {_name(second)} at {second.origin} in the next"
        if first.spec != second.spec or first.results != second.results or first.also != second.also:
            return f"{_name(first)} at {first.origin} has other arguments in the next call"
        free = frozenset[int]() if same_size else _sizes_among(first)
        pairs = enumerate(zip(first.leaves, second.leaves, strict=True))
        if not all(at in free or _same_argument(*pair) for at, pair in pairs):
            return f"{_name(first)} at {first.origin} has other arguments in the next call"
    if len(a.calls) != len(b.calls):
        longer = max(a.calls, b.calls, key=len)
        extra = longer[min(len(a.calls), len(b.calls))]
        return f"{_name(extra)} at {extra.origin} runs in one of two calls"
    if len(a.values) != len(b.values) or a.outputs != b.outputs:
        return "the calls return different values"
    for one, other in zip(a.values, b.values, strict=True):
        if one.kind is not other.kind or not _same_layout(one, other, same_size):
            return f"a tensor used at {one.origin} has another layout in the next call"
        if one.kind is Kind.NUMBERS and not _same_bits(one.numbers, other.numbers):
            return f"the tensor made from numbers at {one.origin} has other values in the next call"
        if one.kind is Kind.OUTSIDE and (one.tensor() is not other.tensor() or one.tensor() is None):
            return f"another tensor is used at {one.origin} in the next call"
    return ""


def _sizes_among(call: Call) -> frozenset[int]:
    """The leaves of a call's arguments that are sizes."""
    names = _size_arguments(call.function) if isinstance(call.function, torch._ops.OpOverload) else frozenset()
    if not names:
        return frozenset()
    args, kwargs = private.tree_unflatten(range(len(call.leaves)), call.spec)
    given = {**dict(zip((each.name for each in call.function._schema.arguments), args, strict=False)), **kwargs}
    found = (leaf for name in names if name in given for leaf in private.tree_flatten(given[name])[0])
    return frozenset(at for at in found if at is not None and type(call.leaves[at]) is int)


@functools.cache
def _size_arguments(function: Any) -> frozenset[str]:
    return frozenset(_SIZE.findall(str(function._schema)))


def _same_argument(a: Any, b: Any) -> bool:
    if isinstance(a, Weak) and isinstance(b, Weak):
        return a.object() is b.object() is not None
    return a == b if isinstance(a, Ref) and isinstance(b, Ref) else same_leaf(a, b)


def _same_layout(a: Value, b: Value, same_size: bool) -> bool:
    if same_size or a.kind is Kind.OUTSIDE:
        return a.layout == b.layout
    (size, _, *rest), (other, _, *others) = a.layout, b.layout
    return len(size) == len(other) and rest == others


def _name(call: Call) -> str:
    return op_name(call.function)


def _same_bits(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    assert a is not None
    assert b is not None
    return a.shape == b.shape and bool(torch.equal(_bytes(a), _bytes(b)))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
