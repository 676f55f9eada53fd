"""What the rows of padded inputs hold in the runs of a proof: contents that no real row of the result may notice.

Two kinds are needed. *Varied*: the caller's rows beside others. It finds what adds rows up or orders them. It may miss
what looks for an extreme among the rows (the largest magnitude, the smallest position, whether a flag is set
everywhere), since a real row may hold the extreme. *Alike*: all real rows hold one row, the padded ones another, and
then the other way round. Whatever tells the two rows apart shows in one of the two.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from graphcap.cudagraph.padded.corner import around, corner
from graphcap.cudagraph.program import ANY

#: Writes a content: takes a padded input, the size of its corner, for integers the bound below which all values are
#: good (``None``: not known), and a number that tells the inputs apart.
Content = Callable[[torch.Tensor, torch.Size, int | None, int], None]

#: What padded rows of floats hold where they are varied, at least; larger than what a real row brings, and far from
#: overflow.
_LARGE = {torch.float16: 16.0, torch.float32: 1e3, torch.float64: 1e3, torch.bfloat16: 1e3}
_LARGE_OTHERS = 16.0


def can_be_drawn(tensor: torch.Tensor, bound: int | None) -> bool:
    """Whether a row may hold numbers that no row of the call holds."""
    if tensor.is_floating_point():
        return True
    if tensor.is_complex() or bound is None or tensor.numel() == 0:
        return False
    return tensor.dtype is torch.bool or bound < ANY or int(tensor.detach().cpu().max()) > 0


def varied(seed: int) -> Content:
    """The caller's rows, and around them large floats of both signs, and integers that are good: any where that is
    known, otherwise those of other rows."""

    def write(tensor: torch.Tensor, size: torch.Size, bound: int | None, number: int) -> None:
        generator = _generator(seed, number)
        for dim, rest in around(tensor, size):
            if size[dim] == 0:
                continue
            if tensor.is_floating_point():
                rest.copy_((torch.rand(rest.shape, generator=generator) * 2 - 1) * _large(corner(tensor, size)))
            elif can_be_drawn(tensor, bound):
                low, high = _range(corner(tensor, size), bound)
                rest.copy_(torch.randint(low, high, rest.shape, generator=generator))
            else:
                rows = torch.randint(size[dim], (rest.shape[dim],), generator=generator)
                found = corner(tensor, [*tensor.shape[: dim + 1], *size[dim + 1 :]]).detach().cpu()
                rest.copy_(found.index_select(dim, rows))

    return write


def alike(seed: int, real: int, padded: int) -> Content:
    """Two rows are drawn: all real rows hold one of them (``real``: 0 or 1), all padded ones the one or the other
    (``padded``). What cannot be drawn stays as it is."""

    def write(tensor: torch.Tensor, size: torch.Size, bound: int | None, number: int) -> None:
        if not can_be_drawn(tensor, bound) or 0 in size:
            return
        rows = _two_rows(tensor, size, bound, _generator(seed, number))
        corner(tensor, size).copy_(rows[real])
        for _, rest in around(tensor, size):
            rest.copy_(rows[padded])

    return write


def _two_rows(
    tensor: torch.Tensor, size: torch.Size, bound: int | None, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Different ones; with one element along each dim in which the tensor is padded."""
    shape = [1 if padded != real else real for padded, real in zip(tensor.shape, size, strict=True)]
    given = corner(tensor, size)
    if tensor.is_floating_point():
        scale = min(_magnitude(given) or 1.0, torch.finfo(tensor.dtype).max / 64)
        return tuple(torch.randn(shape, generator=generator).clamp(-4, 4) * scale for _ in range(2))  # type: ignore[return-value]
    low, high = _range(given, bound)
    first = torch.randint(low, high, shape, generator=generator)
    further = torch.randint(1, max(2, high - low), shape, generator=generator)
    return first, low + (first - low + further) % (high - low)


def _range(given: torch.Tensor, bound: int | None) -> tuple[int, int]:
    """From 0 to below where integers are drawn: no larger than those of the call where they are calculated with (masks,
    positions, lengths), otherwise all that are good, as the call may hold few of them."""
    assert bound is not None
    if given.dtype is torch.bool:
        return 0, 2
    good = bound if bound < ANY else int(given.detach().cpu().max()) + 1
    return 0, max(1, min(good, torch.iinfo(given.dtype).max))


def _large(real: torch.Tensor) -> float:
    scale = max(4 * _magnitude(real), _LARGE.get(real.dtype, _LARGE_OTHERS))
    return min(scale, torch.finfo(real.dtype).max / 64)


def _magnitude(real: torch.Tensor) -> float:
    """The largest finite one. It is worked out on the host, as are all contents: kernels of the device that nothing
    else uses would have to be loaded for it."""
    values = real.detach().cpu().float().abs()
    return float(torch.where(values.isfinite(), values, 0).max()) if values.numel() else 0.0


def _generator(seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1000 + number)
