"""Inductor's views of what it has not computed yet, where a size has no example.

Up to torch 2.12 Inductor first writes such a value to memory: ``(slots >= 0)[:, None]`` becomes a kernel of its own,
and its readers are not fused. In a decode step of 28 layers that was 28 kernels of 818. From 2.13 on it changes indices
instead, as it does everywhere else.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import sympy

from graphcap.compiler.private.patched import IS_NEEDED, Patched

Reindex = Callable[[Sequence[Any]], tuple[Any, ...]]


@contextlib.contextmanager
def inlined_views() -> Iterator[None]:
    """Within it, also in other threads, Inductor changes indices wherever :func:`reindexer` knows how."""
    if not IS_NEEDED:
        yield
        return
    from torch._inductor.ir import View

    with _create.within(View):
        yield


def _view_of(plain: Any) -> Any:
    from torch._inductor.ir import is_storage_and_layout
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    def view(cls: Any, x: Any, new_size: Sequence[Any]) -> Any:
        if not is_storage_and_layout(x) and (free_unbacked_symbols(x.get_size()) or free_unbacked_symbols(new_size)):
            old, new = cls.resolve_negative_size(x.get_size(), new_size)
            reindex = None if list(old) == list(new) else reindexer(old, new)
            if reindex is not None:
                return cls(data=x, size=list(new), reindex=reindex)
        return plain.__func__(cls, x, new_size)

    return classmethod(view)


_create = Patched("create", _view_of)


def reindexer(old: Sequence[Any], new: Sequence[Any]) -> Reindex | None:
    """What a reshape does to indices: takes those of the ``new`` size, returns those of the ``old`` one.

    Args:
        old: a size, of ints and sympy expressions.
        new: one of as many elements.

    Returns:
        ``None`` unless both have the same expressions in the same order, with as many elements in the numbers before,
        between and after them.
    """
    parts_old, parts_new = _parts(old), _parts(new)
    if [size for size, _ in parts_old] != [size for size, _ in parts_new] or 0 in (*old, *new):
        return None
    pairs = [(here, there) for (_, here), (_, there) in zip(parts_old, parts_new, strict=True)]
    return lambda index: _old_index(index, old, new, pairs)


def _parts(sizes: Sequence[Any]) -> list[tuple[Any, list[int]]]:
    """The dims that are expressions, and the runs of numbers around them, each with its elements and its dims, those of
    size 1 left out."""
    parts: list[tuple[Any, list[int]]] = [(1, [])]
    for dim, size in enumerate(sizes):
        if not isinstance(size, (int, sympy.Integer)):
            parts += [(size, [dim]), (1, [])]
        elif size != 1:
            parts[-1] = (parts[-1][0] * int(size), [*parts[-1][1], dim])
    return parts


def _old_index(
    index: Sequence[Any], old: Sequence[Any], new: Sequence[Any], pairs: list[tuple[list[int], list[int]]]
) -> tuple[Any, ...]:
    from torch.utils._sympy.functions import FloorDiv, ModularIndexing

    found: list[Any] = [sympy.S.Zero] * len(old)
    for here, there in pairs:
        if [old[dim] for dim in here] == [new[dim] for dim in there]:
            for dim, other in zip(here, there, strict=True):
                found[dim] = index[other]
            continue
        flat = sum((index[dim] * math.prod(int(new[d]) for d in there if d > dim) for dim in there), sympy.S.Zero)
        for dim in here:
            below = math.prod(int(old[d]) for d in here if d > dim)
            first = dim == here[0]
            found[dim] = FloorDiv(flat, below) if first else ModularIndexing(flat, below, int(old[dim]))
    return tuple(found)
