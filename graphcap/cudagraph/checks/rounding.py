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
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from graphcap.cudagraph.checks.differences import Difference, difference, relative_gap
from graphcap.cudagraph.private import bytes_of, over_storage, storage_address

_SEED = 1
_ONE_IN = 16  #: floats is nudged
_ULP = 0.75  #: of ``eps``; rounded, that is one unit in the last place
#: What is nudged, each with the dtype in which that is calculated.
_WIDER = {
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.float32: torch.float64,
    torch.float64: torch.float64,
}
_MAX_SPREAD = 0.2  #: of a row's largest value; what rounding moves further cannot be told from what is wrong
_PLAIN = (torch.Tensor, torch.nn.Parameter)


class TooUnsteady(Exception):
    """Rounding alone changes the values so much that a comparison says nothing."""


def nudged(results: Sequence[Any], others: Iterable[Any]) -> list[Any]:
    """What a step returned, with one in 16 of the floats moved by its last bit, up or down at random.

    What is moved is a copy: a step may return memory that outlives it. Results that share memory share the copy.

    Args:
        results: of the step.
        others: values that exist besides; results in their memory are left as they are.
    """
    known = {storage_address(each) for each in others if isinstance(each, torch.Tensor)}
    places = [storage_address(each) if type(each) in _PLAIN else 0 for each in results]
    dtypes: dict[int, set[torch.dtype]] = {}
    for place, each in zip(places, results, strict=True):
        if place and place not in known:
            dtypes.setdefault(place, set()).add(each.dtype)
    copies: dict[int, torch.UntypedStorage] = {}
    moved = []
    for place, each in zip(places, results, strict=True):
        if len(dtypes.get(place, ())) != 1 or not dtypes[place] <= _WIDER.keys():
            moved.append(each)
            continue
        if place not in copies:
            copies[place] = _nudged_memory(each).untyped_storage()
        moved.append(over_storage(copies[place], each, int(each.storage_offset())))
    return moved


def _nudged_memory(tensor: torch.Tensor) -> torch.Tensor:
    """The storage of a tensor, one float after the other."""
    storage = tensor.untyped_storage()
    flat = bytes_of(storage, 0, storage.nbytes() // tensor.element_size() * tensor.element_size()).view(tensor.dtype)
    # A generator of its own: the program's draw the same numbers in every run.
    generator = torch.Generator(tensor.device).manual_seed(_SEED)
    drawn = torch.randint(0, 2 * _ONE_IN, flat.shape, generator=generator, device=tensor.device, dtype=torch.int8)
    wide, eps = _WIDER[tensor.dtype], _ULP * torch.finfo(tensor.dtype).eps
    return (flat.to(wide) * (1 + eps * ((drawn == 0).to(wide) - (drawn == 1).to(wide)))).to(tensor.dtype)


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
