"""Which sizes a region was called with, which rungs served them, and what padding them cost."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from graphcap.cudagraph.counters.stats import RunnerStats
from graphcap.cudagraph.dispatch.ladders import TOKENS


@dataclass(frozen=True, slots=True)
class SizeSeen:
    """One size and the rung for it; fields as in :class:`~graphcap.cudagraph.counters.stats.SizeStats`."""

    size: tuple[int, ...]
    rung: tuple[int, ...] | None
    replays: int
    live: int

    @property
    def served_at(self) -> tuple[int, ...]:
        """The sizes that a replay computed: the rung, or the size itself where an exact plan served it."""
        return self.size if self.rung is None else self.rung

    @property
    def calls(self) -> int:
        """Calls of this size, replayed or live."""
        return self.replays + self.live


@dataclass(frozen=True, slots=True)
class Traffic:
    """The sizes of a region's calls: a snapshot.

    Tokens are what the dim ``num_tokens`` counts. Without such a dim they are the product of all: a batch of 3
    sequences of 100 is 300 tokens.

    Attributes:
        names: the named dims.
        seen: one entry for each size and rung.
    """

    names: tuple[str, ...] = ()
    seen: tuple[SizeSeen, ...] = ()

    def histogram(self) -> dict[tuple[int, ...], int]:
        """Size -> calls, ascending."""
        counts: Counter[tuple[int, ...]] = Counter()
        for each in self.seen:
            counts[each.size] += each.calls
        return dict(sorted(counts.items()))

    def hits(self) -> dict[tuple[int, ...], int]:
        """Rung -> replays that its plan served, ascending."""
        counts: Counter[tuple[int, ...]] = Counter()
        for each in self._served():
            counts[each.served_at] += each.replays
        return dict(sorted(counts.items()))

    def uncovered(self) -> dict[tuple[int, ...], int]:
        """Size -> calls of the sizes that no rung serves, most frequent first."""
        counts: Counter[tuple[int, ...]] = Counter()
        for each in self.seen:
            if each.rung is None:
                counts[each.size] += each.calls
        return dict(counts.most_common())

    @property
    def tokens(self) -> int:
        """Tokens that callers brought to replays."""
        return sum(each.replays * self._tokens_in(each.size) for each in self._served())

    @property
    def padded_tokens(self) -> int:
        """Tokens that replays computed for nobody."""
        return sum(each.replays * self._tokens_in(each.served_at) for each in self._served()) - self.tokens

    @property
    def padding_waste(self) -> float:
        """The part of what replays computed that was padding: 0 to below 1."""
        padded = self.padded_tokens
        return padded / (self.tokens + padded) if padded else 0.0

    def _tokens_in(self, size: tuple[int, ...]) -> int:
        return size[self.names.index(TOKENS)] if TOKENS in self.names else math.prod(size)

    def _served(self) -> Iterator[SizeSeen]:
        return (each for each in self.seen if each.replays)


def traffic_of(runners: Iterable[RunnerStats]) -> Traffic:
    """The traffic of runners, added up: of those with the dims of the first one that has any."""
    names: tuple[str, ...] = ()
    counted: dict[tuple[tuple[int, ...], tuple[int, ...] | None], SizeSeen] = {}
    for stats in runners:
        names = names or stats.dim_names
        if not names or stats.dim_names != names:  # without dims there are no sizes to tell apart
            continue
        for key, each in list(stats.sizes.items()):  # a snapshot: another thread may be adding a size
            before = counted.get(key, SizeSeen(each.size, each.rung, 0, 0))
            counted[key] = dataclasses.replace(
                before, replays=before.replays + each.replays, live=before.live + each.live
            )
    return Traffic(names, tuple(sorted(counted.values(), key=lambda each: (each.size, each.served_at))))
