"""What the sizes of a function's results follow: found by comparing recordings of calls of several sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from graphcap.cudagraph import DimSize, Size


@dataclass(frozen=True, slots=True)
class Sample:
    """One call.

    Attributes:
        values: per symbol its value.
        outputs: the size of each result.
    """

    values: Mapping[str, int]
    outputs: tuple[tuple[int, ...], ...]


def solve(samples: Sequence[Sample]) -> tuple[tuple[DimSize, ...], ...]:
    """Per result and dim what the size follows: ``None`` where that is not one symbol times a number plus another.

    A size that was the same in all calls counts as fixed, and one that may follow several symbols as following the
    first of those with the least to be added. Where another call contradicts (:func:`contradicts`) it is solved anew.

    Args:
        samples: at least one; all with the same symbols and the same number of results and dims.
    """
    first = samples[0]
    return tuple(
        tuple(_follows(samples, number, dim) for dim in range(len(sizes))) for number, sizes in enumerate(first.outputs)
    )


def contradicts(sizes: Sequence[Sequence[DimSize]], sample: Sample) -> bool:
    """Whether a call's results have other sizes than they should."""
    return tuple(tuple(_at(size, sample.values) for size in each) for each in sizes) != sample.outputs


def tell_apart(samples: Sequence[Sample], real: Mapping[str, int], padded: Mapping[str, int]) -> bool:
    """Whether calls are known that differ in every symbol that a padded call differs in from the real one."""
    return all(
        len({sample.values[symbol] for sample in samples}) > 1 for symbol in real if real[symbol] != padded[symbol]
    )


def _follows(samples: Sequence[Sample], number: int, dim: int) -> DimSize:
    sizes = [sample.outputs[number][dim] for sample in samples]
    if len(set(sizes)) == 1:
        return sizes[0]
    fitting = [found for symbol in samples[0].values if (found := _affine(samples, sizes, symbol)) is not None]
    return min(fitting, key=lambda size: abs(size.offset), default=None)


def _affine(samples: Sequence[Sample], sizes: Sequence[int], symbol: str) -> Size | None:
    points = sorted({(sample.values[symbol], size) for sample, size in zip(samples, sizes, strict=True)})
    (x, y), (x_last, y_last) = points[0], points[-1]
    if x == x_last:
        return None
    scale, rest = divmod(y_last - y, x_last - x)
    found = Size(symbol, scale, y - scale * x)
    fits = all(found.at(value) == size for value, size in points)
    return found if fits and not rest and scale >= 1 else None


def _at(size: DimSize, values: Mapping[str, int]) -> int | None:
    return size.at(values[size.symbol]) if isinstance(size, Size) else size
