"""The sizes of slices, where the size that is cut has no example.

Up to torch 2.12 the size of ``starts[1:]`` is then a symbol of its own, about which nothing is known: nothing that
reads the slice can be captured or padded. From 2.13 on it is the expression that it is, ``Max(0, s - 1)``.

A graph must be compiled as it was traced, or one size has two names in it: what traces holds the patch until all that
follows from the trace is done.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import sympy
import torch

from graphcap.compiler.private.patched import IS_NEEDED, Patched

_UNBOUNDED = sys.maxsize  #: what ``x[1:]`` has for an end


@contextlib.contextmanager
def exact_slices() -> Iterator[None]:
    """Within it, also in other threads, such slices have the size that they have, while tracing and in Inductor."""
    if not IS_NEEDED:
        yield
        return
    from torch._inductor.lowering import lowerings
    from torch._subclasses.fake_impls import op_implementations_dict

    with _traced.within(op_implementations_dict), _lowered.within(lowerings):
        yield


def bounds(size: Any, start: Any, end: Any) -> tuple[Any, Any] | None:
    """Where a slice of step 1 begins and how long it is.

    Args:
        size: an expression.
        start: a number, or ``None``.
        end: a number, or ``None``; :data:`sys.maxsize` and more is no end.

    Returns:
        ``None`` where torch is not in need of help: for a size that is a number or has examples only, and where start
        or end are known only when the graph runs.
    """
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
    from torch.utils._sympy.functions import Max, Min

    first, last = _number(0 if start is None else start), _number(_UNBOUNDED if end is None else end)
    if first is None or last is None or not free_unbacked_symbols(size):
        return None
    begin = sympy.S.Zero if first == 0 else Max(0, size + first) if first < 0 else Min(first, size)
    # Not the difference of both ends, each within the tensor: that would be the same number in more words.
    stop = size if last >= _UNBOUNDED else size + last if last < 0 else Min(last, size)
    return begin, Max(0, stop - (begin if first < 0 else first))


def _number(value: Any) -> int | None:
    if isinstance(value, torch.SymInt):
        value = value.node.expr
    return int(value) if isinstance(value, (int, sympy.Integer)) else None


def _traced_slice(plain: Callable[..., Any]) -> Callable[..., Any]:
    """For fake tensors."""

    def slice_forward(
        mode: Any, func: Any, tensor: Any, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1
    ) -> Any:
        size = tensor.shape[dim] if tensor.dim() else 0
        found = bounds(size.node.expr, start, end) if isinstance(size, torch.SymInt) and step == 1 else None
        if found is None:
            return plain(mode, func, tensor, dim, start, end, step)
        begin, length = (_symbolic(mode.shape_env, each) for each in found)
        sizes = list(tensor.shape)
        sizes[dim] = length
        return tensor.as_strided(sizes, tensor.stride(), tensor.storage_offset() + begin * tensor.stride(dim))

    return slice_forward


def _symbolic(shape_env: Any, expression: Any) -> Any:
    if expression.is_number:
        return int(expression)
    return shape_env.create_symintnode(expression, hint=None)


def _lowered_slice(plain: Callable[..., Any]) -> Callable[..., Any]:
    """For Inductor."""

    def slice_(x: Any, dim: int = 0, start: Any = 0, end: Any = _UNBOUNDED, step: Any = 1, clamp: bool = True) -> Any:
        sizes = x.get_size()
        found = bounds(sympy.sympify(sizes[dim]), start, end) if clamp and step == 1 and len(sizes) else None
        if found is None:
            return plain(x, dim, start, end, step, clamp)
        begin, length = found
        return plain(x, dim, begin, begin + length, step, clamp=False)

    return slice_


_traced = Patched(torch.ops.aten.slice.Tensor, _traced_slice)
_lowered = Patched(torch.ops.aten.slice.Tensor, _lowered_slice)
