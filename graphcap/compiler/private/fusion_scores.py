"""What a fusion saves, as Inductor's scheduler sees it, where a size has a hint and no example.

Up to torch 2.12 a buffer with such a size counts as 0 bytes: two kernels that read the same one have "no shared data"
and stay two, and a norm is a kernel for its sum and another one for what is done with it. From 2.13 on the hint counts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from graphcap.compiler.private.patched import IS_NEEDED, Patched


def _counting(plain: Callable[..., int]) -> Callable[..., int]:
    def get_dep_size_hint(graph: Any, dep: Any, count_bytes: bool = True) -> int:
        size = plain(graph, dep, count_bytes)
        if size == 0 and _is_hinted(graph, dep):
            size = dep.numbytes_hint() if count_bytes else dep.numel_hint()
            graph.dep_size_hint_cache[(dep, count_bytes)] = size
        return size

    return get_dep_size_hint


def _is_hinted(graph: Any, dep: Any) -> bool:
    """Whether all sizes without an example that a read or write spans have a hint."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    try:
        unbacked = free_unbacked_symbols(dep.get_numel())
    except (KeyError, NotImplementedError):  # of a buffer that the graph does not know, or one without elements
        return False
    return bool(unbacked) and unbacked <= graph.sizevars.var_to_hint_override.keys()


_score = Patched("get_dep_size_hint", _counting)


@contextlib.contextmanager
def hinted_scores() -> Iterator[None]:
    """Within it, also in other threads, hints count."""
    if not IS_NEEDED:
        yield
        return
    from torch._inductor.graph import GraphLowering

    with _score.within(GraphLowering):
        yield
