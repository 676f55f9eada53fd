"""Whether two tensors hold the same values, and in which rows they do not."""

from __future__ import annotations

from dataclasses import dataclass

import torch

#: The largest gap that passes between two runs of one computation, relative to the largest value of the row, by dtype.
TOLERANCES = {torch.float64: 1e-9, torch.complex128: 1e-9, torch.float32: 1e-4, torch.complex64: 1e-4}
#: For bfloat16, float16 and narrower.
NARROW_TOLERANCE = 3e-2

_SHOWN_ROWS = 4
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class Difference:
    """Where two tensors differ.

    Attributes:
        rows: the first indices of dim 0 that differ; a tensor without dims has one row.
        num_rows: how many differ.
        of: how many rows there are.
        max_abs: the largest gap; infinite where a NaN, an infinity, the shape or the dtype differ.
    """

    rows: tuple[int, ...]
    num_rows: int
    of: int
    max_abs: float

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.rows)) + (", ..." if self.num_rows > len(self.rows) else "")
        return f"in {self.num_rows} of {self.of} rows ({shown}), by {self.max_abs:.3g} at most"


def difference(expected: torch.Tensor, actual: torch.Tensor, spread: float = 0.0) -> Difference | None:
    """Compare bit for bit, and where bits differ within the tolerance of the dtype.

    Floats of two runs may differ by rounding; integers and booleans may not. A NaN equals a NaN.

    Args:
        expected: of one run.
        actual: of the other.
        spread: how far rounding moves such values, relative to the largest of the row. Twice as much passes.

    Returns:
        ``None`` where the two agree.
    """
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return Difference((), expected.shape[0] if expected.dim() else 1, 1, float("inf"))
    if expected.numel() == 0:
        return None
    differing = _differing_rows(expected, actual)
    if differing.numel() == 0:
        return None
    of = expected.shape[0] if expected.dim() else 1
    gaps, scales = _gaps(_rows(expected)[differing], _rows(actual)[differing])
    beyond = ~(gaps <= scales * max(TOLERANCES.get(expected.dtype, NARROW_TOLERANCE), 2 * spread))
    if not bool(beyond.any()):
        return None
    rows = differing[beyond]
    worst = gaps[beyond].max().item()
    return Difference(tuple(rows[:_SHOWN_ROWS].tolist()), rows.numel(), of, worst)


def relative_gap(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """The largest gap between two tensors of one dtype, relative to the largest value of its row.

    Infinite for another size, for numbers that are no floats where they differ, and where only one is finite.
    """
    if expected.shape != actual.shape:
        return float("inf")
    if same_bits(expected, actual):
        return 0.0
    gaps, scales = _gaps(_rows(expected), _rows(actual))
    return float(torch.where(gaps == 0, 0.0, gaps / scales).max())


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors of one shape and dtype hold the same bits."""
    return first.numel() == 0 or _differing_rows(first, second).numel() == 0


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as ``[rows, values]``."""
    return tensor.reshape(tensor.shape[0] if tensor.dim() else 1, -1)


def _differing_rows(expected: torch.Tensor, actual: torch.Tensor) -> torch.Tensor:
    """The rows in which a bit differs, as indices."""
    left, right = _rows(_bits(expected)), _rows(_bits(actual))
    return (left != right).any(1).nonzero().flatten()


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor if tensor.dtype is torch.bool else tensor.view(_INTEGERS[tensor.element_size()])


def _gaps(expected: torch.Tensor, actual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each row of ``[rows, values]`` the largest gap, and the largest value that it is to be compared with."""
    dtype = expected.dtype
    wide = torch.complex128 if dtype.is_complex else torch.float64
    left, right = expected.to(wide), actual.to(wide)
    equal = (left == right) | (left.isnan() & right.isnan())
    gap = torch.where(equal, 0.0, (left - right).abs())
    gap = gap.where(~gap.isnan(), float("inf")).amax(1)
    if not (dtype.is_floating_point or dtype.is_complex):
        # Large integers may be one number in float64; their bits differ all the same.
        return gap.clamp(min=1.0), torch.zeros_like(gap)
    scale = left.abs().where(left.isfinite(), 0.0).amax(1)
    return gap, scale
