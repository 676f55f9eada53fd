"""The ladders of all named dims of a region, and the rungs that they make together."""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterable, Mapping, Sequence

from graphcap.config import Config
from graphcap.cudagraph.dispatch.ladder import Ladder, default_sizes

#: The dim that a plain list of sizes is for, where there are several.
TOKENS = "num_tokens"


class Ladders:
    """One entry per dim of the key: a ladder to pad to, sizes that are declared without padding, or nothing.

    Attributes:
        names: the dims, in the order in which sizes are given everywhere below.
        ladders: per dim its ladder; ``None`` where no size is declared.
        padded: the names of the dims that may be padded. Any other dim keeps its size.
        maximum: a size of any dim above it is never captured; ``None`` is no limit.
        notes: what of the settings could not be used, each in one sentence.
    """

    def __init__(
        self,
        names: Sequence[str],
        ladders: Sequence[Ladder | None],
        padded: Collection[str] = (),
        maximum: int | None = None,
        notes: Iterable[str] = (),
    ) -> None:
        """Keep them; ``names`` and ``ladders`` have one length."""
        self.names = tuple(names)
        self.ladders = tuple(ladders)
        self.padded = frozenset(padded)
        self.maximum = maximum
        self.notes = tuple(notes)
        # A dim that may be padded and has no ladder would have nothing to be padded to: it keeps its size.
        pairs = zip(self.names, self.ladders, strict=True)
        self._pads_to = tuple(ladder if name in self.padded else None for name, ladder in pairs)

    def rung_of(self, sizes: tuple[int, ...]) -> tuple[int, ...] | None:
        """The sizes at which a batch is captured: per dim the rung, or the size itself where it is not padded.

        ``None`` where a dim has no rung for it; :meth:`why_uncovered` says which.
        """
        found = []
        for n, ladder in zip(sizes, self._pads_to, strict=True):
            rung = n if ladder is None else ladder.rung_of(n)
            if rung is None or (self.maximum is not None and rung > self.maximum):
                return None
            found.append(rung)
        return tuple(found)

    def why_uncovered(self, sizes: tuple[int, ...]) -> str:
        """Why there is no rung, with the dim and without the size; ``""`` where there is one."""
        for name, n, ladder in zip(self.names, sizes, self._pads_to, strict=True):
            if self.maximum is not None and n > self.maximum:
                return f"{name} above max_capture_size={self.maximum}"
            if ladder is not None and ladder.rung_of(n) is None:
                return f"{name}: {ladder.why_uncovered(n)}"
        return ""

    def is_declared(self, rung: tuple[int, ...]) -> bool:
        """Whether every size is one of a ladder: such a rung is captured at its second sighting."""
        pairs = zip(rung, self.ladders, strict=True)
        return bool(rung) and all(ladder is not None and size in ladder for size, ladder in pairs)

    @property
    def num_rungs(self) -> int:
        """How many rungs there are: the product over the dims; 0 where a dim has no ladder."""
        if not self.ladders:
            return 0
        return math.prod(0 if ladder is None else len(ladder.sizes) for ladder in self.ladders)

    def rungs(self, max_plans: int) -> list[tuple[int, ...]]:
        """The rungs to capture ahead, largest first: smaller ones then fit into memory that larger ones left.

        Size is the product over the dims. Where there are more than ``max_plans``, the smallest stay: the less work in
        a batch, the more of its time is the launching that a graph saves.
        """
        if not self.num_rungs:
            return []
        sizes = [ladder.sizes for ladder in self.ladders if ladder is not None]
        return sorted(_smallest(sizes, max_plans), key=lambda rung: (math.prod(rung), rung), reverse=True)


def _smallest(sizes: Sequence[tuple[int, ...]], count: int) -> list[tuple[int, ...]]:
    """The ``count`` smallest elements of the product, without walking through all of it."""
    found: list[tuple[int, ...]] = []
    first = tuple(each[0] for each in sizes)
    waiting = [(math.prod(first), first, (0,) * len(sizes))]
    while waiting and len(found) < count:
        _, rung, at = heapq.heappop(waiting)
        found.append(rung)
        # Each element is reached on one way only: the dims go up in order, so none before the last that went up.
        last = max((dim for dim, index in enumerate(at) if index), default=0)
        for dim in range(last, len(sizes)):
            if at[dim] + 1 < len(sizes[dim]):
                up = (*at[:dim], at[dim] + 1, *at[dim + 1 :])
                larger = tuple(each[index] for each, index in zip(sizes, up, strict=True))
                heapq.heappush(waiting, (math.prod(larger), larger, up))
    return found


def ladders_of(names: Sequence[str], padded: Collection[str], config: Config) -> Ladders:
    """The ladders of a region.

    Args:
        names: its dims that are in the key, in order; a dim without a name of its own goes by its symbol.
        padded: those that may be padded.
        config: of it ``capture_sizes``, ``max_capture_size`` and ``max_padding_ratio``.
    """
    declared, notes = _declared(names, padded, config)
    ladders = [Ladder(declared[name], config.max_padding_ratio) if name in declared else None for name in names]
    return Ladders(names, ladders, padded, config.max_capture_size, notes)


def _declared(
    names: Sequence[str], padded: Collection[str], config: Config
) -> tuple[Mapping[str, tuple[int, ...]], list[str]]:
    """The sizes of each dim that has any, and what is wrong with the settings."""
    given, maximum = config.capture_sizes, config.max_capture_size
    if given is None:
        return {name: default_sizes(maximum) for name in names if name in padded}, []
    notes = []
    if isinstance(given, Mapping):
        sizes = {name: given[name] for name in names if name in given}
        notes += [
            f"capture_sizes names {name!r}; the dims here are {_list(names)}" for name in given.keys() - set(names)
        ]
    elif TOKENS in names or len(names) == 1:
        sizes = {TOKENS if TOKENS in names else names[0]: given}
    else:
        sizes = {}
        if names:
            notes.append(f"capture_sizes is a list, and of the dims {_list(names)} none is {TOKENS!r}: use a mapping")
    kept = {name: tuple(n for n in each if maximum is None or n <= maximum) for name, each in sizes.items()}
    for name, each in sizes.items():
        if len(kept[name]) < len(each):
            left = ", ".join(map(str, each[len(kept[name]) :]))
            notes.append(f"capture_sizes of {name}: {left} above max_capture_size={maximum}, never captured")
    return kept, sorted(notes)


def _list(names: Sequence[str]) -> str:
    return ", ".join(names) or "(none)"
