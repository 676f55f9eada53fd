"""The ladder of one dim: the sizes that are captured, and which of them serves a batch of a given size."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

from graphcap.errors import ConfigError

_TABLE_SIZES = 65536  #: sizes that are looked up in a table; larger ones by bisection, so that no table takes megabytes


class Ladder:
    """Ascending sizes. A batch is padded to the smallest one that holds it, unless too much of it would be padding.

    Attributes:
        sizes: the rungs, ascending, without repeats; may be empty.
        max_padding_ratio: the largest ``(rung - n) / rung`` that is served; 0 serves the rungs alone.
    """

    __slots__ = ("_table", "max_padding_ratio", "sizes")

    def __init__(self, sizes: Iterable[int], max_padding_ratio: float) -> None:
        """Build the table.

        Raises:
            ConfigError: a size below 1, or a ratio outside ``[0, 1)``.
        """
        self.sizes = tuple(sorted(set(sizes)))
        if self.sizes and self.sizes[0] < 1:
            raise ConfigError(f"a size of a ladder is at least 1, got {self.sizes[0]}")
        if not 0 <= max_padding_ratio < 1:
            raise ConfigError(f"max_padding_ratio: expected a number from 0 to below 1, got {max_padding_ratio!r}")
        self.max_padding_ratio = max_padding_ratio
        self._table = [self._find(n) for n in range(min(self.largest + 1, _TABLE_SIZES))]

    @property
    def largest(self) -> int:
        """The top rung, 0 for an empty ladder."""
        return self.sizes[-1] if self.sizes else 0

    def rung_of(self, n: int) -> int | None:
        """The rung that serves a batch of ``n``; ``None`` above the top rung and where the padding would be too much.

        A table look-up for sizes below 65536. No rung serves an empty batch: all of it would be padding.
        """
        return self._table[n] if 0 <= n < len(self._table) else self._find(n)

    def why_uncovered(self, n: int) -> str:
        """Why no rung serves ``n``, without ``n`` itself, so that such reasons can be counted; ``""`` if one does."""
        if self.rung_of(n) is not None:
            return ""
        if n > self.largest:
            return f"above the ladder, which ends at {self.largest}"
        return f"more padding than max_padding_ratio={self.max_padding_ratio:g}"

    def _find(self, n: int) -> int | None:
        if not 0 < n <= self.largest:
            return None
        rung = self.sizes[bisect_left(self.sizes, n)]
        return rung if (rung - n) / rung <= self.max_padding_ratio else None

    def __contains__(self, n: object) -> bool:
        return isinstance(n, int) and self.rung_of(n) == n

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Ladder):
            return NotImplemented
        return self.sizes == other.sizes and self.max_padding_ratio == other.max_padding_ratio

    def __hash__(self) -> int:
        return hash((self.sizes, self.max_padding_ratio))

    def __repr__(self) -> str:
        return f"Ladder({list(self.sizes)}, max_padding_ratio={self.max_padding_ratio:g})"


#: The sizes where none are declared.
DEFAULT_SIZES = (1, 2, 4, *range(8, 257, 8), *range(272, 513, 16))


def default_sizes(max_capture_size: int | None = None) -> tuple[int, ...]:
    """1, 2, 4, 8..256 by 8, 272..512 by 16, up to ``max_capture_size``.

    A maximum below 512 becomes the top rung itself, so that no size up to it is left out.
    """
    if max_capture_size is None or max_capture_size >= DEFAULT_SIZES[-1]:
        return DEFAULT_SIZES
    return tuple(sorted({size for size in DEFAULT_SIZES if size < max_capture_size} | {max_capture_size}))


def requests_ladder(tokens: Ladder, query_len: int, max_num_reqs: int | None = None) -> Ladder:
    """The ladder of uniform decode batches, counted in requests of ``query_len`` tokens each.

    A rung of ``r`` requests is a batch of exactly ``r * query_len`` tokens. The rungs are those of the token ladder,
    each rounded up to whole requests, or down where that would pass the top rung. ``max_num_reqs`` cuts the ladder, and
    is its top rung where the token ladder reaches as far: the fullest batch is never the one without a graph.

    Raises:
        ConfigError: ``query_len`` or ``max_num_reqs`` below 1.
    """
    if query_len < 1:
        raise ConfigError(f"a uniform batch brings at least one token for each request, got {query_len}")
    if max_num_reqs is not None and max_num_reqs < 1:
        raise ConfigError(f"max_num_reqs: expected at least 1, got {max_num_reqs}")
    most = tokens.largest // query_len
    counts = {min(-(-size // query_len), most) for size in tokens.sizes} - {0}
    if max_num_reqs is not None and max_num_reqs <= most:
        counts = {count for count in counts if count < max_num_reqs} | {max_num_reqs}
    return Ladder(counts, tokens.max_padding_ratio)
