"""What rounding makes of the values of a computation.

Some kernels round differently from one run to the next, and what follows carries that on: after 28 layers in bfloat16
two live runs of the same code may be percents apart. A tolerance for one operation says nothing about that. So where
values differ, the computation is judged by itself: by one more run, in which some of the floats that a step returns are
off by their last bit before the next step reads them. (Of 28 layers with random weights, in bfloat16: where one element
after the first step is off, the largest gap is 3 % of its row's largest value at the end, where one in 16 after each
step is, 11 %. An H200 is 3 % apart from itself.)
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch

from graphcap.cudagraph.checks.differences import Difference, difference, relative_gap
from graphcap.cudagraph.private import bytes_of, storage_address

_SEED = 1
_ONE_IN = 16  #: floats is nudged
_ULP = 0.75  #: of ``eps``; rounded, that is one unit in the last place
_WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}
_MAX_SPREAD = 0.2  #: of a row's largest value; what rounding moves further cannot be told from what is wrong
_NUDGED = {*_WIDER, torch.float64}


class TooUnsteady(Exception):
    """Rounding alone changes the values so much that a comparison says nothing."""


def nudge(results: Sequence[Any], given: Collection[int]) -> None:
    """Move one in 16 of the floats in the memory of these results by its last bit, up or down at random.

    Args:
        results: what a step returned.
        given: the addresses of storages that are not the step's own, and are left alone.
    """
    own: dict[int, set[torch.dtype]] = {}
    tensors = [each for each in results if isinstance(each, torch.Tensor)]
    for tensor in tensors:
        own.setdefault(storage_address(tensor), set()).add(tensor.dtype)
    for tensor in tensors:
        dtypes = own.pop(storage_address(tensor), set())
        if storage_address(tensor) not in {0, *given} and dtypes <= _NUDGED and len(dtypes) == 1:
            _nudge_memory(tensor)


def _nudge_memory(tensor: torch.Tensor) -> None:
    storage = tensor.untyped_storage()
    flat = bytes_of(storage, 0, storage.nbytes() // tensor.element_size() * tensor.element_size()).view(tensor.dtype)
    # A generator of its own: the program's draw the same numbers in every run.
    generator = torch.Generator(tensor.device).manual_seed(_SEED)
    drawn = torch.randint(0, 2 * _ONE_IN, flat.shape, generator=generator, device=tensor.device, dtype=torch.int8)
    wide = _WIDER.get(tensor.dtype, torch.float64)
    eps = _ULP * torch.finfo(tensor.dtype).eps if wide is not tensor.dtype else torch.finfo(wide).eps
    flat.copy_(flat.to(wide) * (1 + eps * ((drawn == 0).to(wide) - (drawn == 1).to(wide))))


def spread(settled: Any, nudged: Any) -> float:
    """How far rounding moves a value, relative to the largest of its row; of all rows the most.

    Infinite for numbers that are no floats, where they differ at all.
    """
    if isinstance(settled, torch.Tensor) and isinstance(nudged, torch.Tensor):
        return relative_gap(settled, nudged)
    return 0.0 if settled == nudged else math.inf


def beyond_rounding(what: str, expected: torch.Tensor, actual: torch.Tensor, by_rounding: float) -> Difference | None:
    """Where two tensors that differ do so by more than rounding explains.

    Args:
        what: what a user would call them.
        expected: of one run.
        actual: of the other.
        by_rounding: their :func:`spread`.

    Raises:
        TooUnsteady: nothing could be seen in them.
    """
    if by_rounding > _MAX_SPREAD:
        raise TooUnsteady(f"rounding alone changes {what} as much as anything that could be wrong")
    return difference(expected, actual, by_rounding)
