"""What one plan is good for: a mode, a kind of batch, and the sizes that it is captured at."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from graphcap.config import CUDAGraphMode


@dataclass(frozen=True, slots=True)
class Batch:
    """The kind of a batch, apart from the sizes of the arguments.

    Attributes:
        uniform_query_len: the tokens of each request where all have the same number.
        num_reqs: as said by a step; ``None`` where nobody said it.
        tags: those with plans of their own.
    """

    uniform_query_len: int | None = None
    num_reqs: int | None = None
    tags: tuple[tuple[str, Hashable], ...] = ()


@dataclass(frozen=True, slots=True)
class Route:
    """What one plan is good for.

    Attributes:
        mode: PIECEWISE or FULL.
        batch: the kind of batch, as far as the plan depends on it.
        sizes: per symbol of the key the size at which the plan is captured; ``None`` where it does not depend on it.
        rung: the symbols that may be padded for it, with the size they are padded to; empty for exact sizes.
        named: the padded size of each declared dim, by name.
        is_declared: whether it is on the ladder.
    """

    mode: CUDAGraphMode
    batch: Batch
    sizes: tuple[Any, ...]
    rung: Mapping[str, int] = field(hash=False)
    named: Mapping[str, int] = field(hash=False)
    is_declared: bool

    @property
    def key(self) -> Hashable:
        """By which plans are kept. Which of the sizes may be padded is left out: a plan that may be padded in more
        serves whoever needs less (:meth:`covers`), and two of the same sizes would take twice the memory."""
        return self.mode, self.batch, self.sizes

    def covers(self, other: Route) -> bool:
        """Whether a plan for this route serves all that one for the other would: they have one key, and the sizes that
        the other may be padded in may be padded here."""
        return other.rung.keys() <= self.rung.keys()

    def joined(self, other: Route, allowed: Collection[str]) -> Route:
        """The route with the same key that covers both, as far as symbols are ``allowed`` to be padded."""
        rung = {symbol: size for symbol, size in {**other.rung, **self.rung}.items() if symbol in allowed}
        return replace(self, rung=rung, is_declared=self.is_declared or other.is_declared)

    def padded_in(self, real: Mapping[str, int]) -> frozenset[str]:
        """The symbols that a batch of these sizes has to be padded in."""
        return frozenset(symbol for symbol, size in self.rung.items() if real.get(symbol) != size)

    def computed(self, real: tuple[int, ...]) -> tuple[int, ...]:
        """The sizes that a batch of these is computed at: padded where the plan depends on them."""
        return tuple(size if at is None else at for size, at in zip(real, self.sizes, strict=True))
