"""What a runner counts while it runs, for reports. Counting is always on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

_MAX_SIZES = 65536  #: sizes that are counted


class PlansMade:
    """How many plans this process has made; who relies on what was true when one was made can tell that there is a new
    one."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


plans_made = PlansMade()


@dataclass(slots=True)
class PlanStats:
    """One captured shape.

    Attributes:
        key: the sizes that it was captured at; ``None`` for one that it does not depend on.
        mode: ``"FULL"`` or ``"PIECEWISE"``: what was asked of this plan.
        num_segments: how many graphs one replay launches.
        captured: names of the steps inside the graphs.
        live: names of the steps that run live, each with the reason.
        bytes: growth of device memory by the capture: the two below together.
        exclusive_bytes: of it what goes when this plan goes: the executable graphs.
        shared_bytes: of it what other plans use as well (pool, workspaces, static buffers); the first plan to need it
            shows it.
        seconds: how long the capturing call took.
        replays: how often the plan has run since.
        source: the generated replay function.
    """

    key: tuple[Any, ...]
    mode: str
    num_segments: int
    captured: list[str]
    live: dict[str, str]
    bytes: int
    seconds: float
    replays: int = 0
    source: str = field(default="", repr=False)
    exclusive_bytes: int = 0
    shared_bytes: int = 0


@dataclass(slots=True)
class SizeStats:
    """One size that batches really had, before padding.

    Attributes:
        size: one number per named dim, in the order of :attr:`RunnerStats.dim_names`.
        rung: the sizes at which such a batch is captured; ``None`` where the ladder does not cover it.
        replays: calls of this size that a plan served.
        live: calls of this size without a graph, for whatever reason.
    """

    size: tuple[int, ...]
    rung: tuple[int, ...] | None
    replays: int = 0
    live: int = 0


@dataclass(slots=True)
class RunnerStats:
    """One region.

    Attributes:
        plans: those that can be replayed now.
        live_calls: calls without a graph, by reason.
        failures: captures that failed, each with what happened.
        recaptures: plans captured again because a static address had moved.
        evictions: plans dropped.
        captures: plans that were ever added.
        capture_seconds: how long their capturing calls took, together.
        retired_replays: replays of plans that are no longer in ``plans``.
        bindings: how each input gets into the graph, by its name, for the latest plan.
        moves: how often the address of a static input changed, by its name.
        dim_names: the dims of the sizes below.
        sizes: a counter for each pair of a size that was seen and its rung; :meth:`of_size` makes them.
        divergences: replays that differed from a live run, one line for each step.
        unchecked: operations captured on trust, or steps, that could not be compared with a live run, each with the
            reason.
        on_plan: told of each plan when it has been captured.
    """

    plans: list[PlanStats] = field(default_factory=list)
    live_calls: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    recaptures: int = 0
    evictions: int = 0
    captures: int = 0
    capture_seconds: float = 0.0
    retired_replays: int = 0
    bindings: dict[str, str] = field(default_factory=dict)
    moves: Counter[str] = field(default_factory=Counter)
    dim_names: tuple[str, ...] = ()
    sizes: dict[tuple[Any, Any], SizeStats] = field(default_factory=dict)
    divergences: list[str] = field(default_factory=list)
    unchecked: dict[str, str] = field(default_factory=dict)
    on_plan: Callable[[PlanStats], None] | None = field(default=None, repr=False)

    def of_size(self, size: tuple[int, ...], rung: tuple[int, ...] | None) -> SizeStats:
        """The counter of one size. Keep it: a replay then costs one increment and no look-up.

        Where 65536 are kept already, a new size gets one that no report shows: traffic must not fill the memory.
        """
        found = self.sizes.get((size, rung))
        if found is None:
            found = SizeStats(size, rung)
            if len(self.sizes) < _MAX_SIZES:
                self.sizes[size, rung] = found
        return found

    def add(self, plan: PlanStats) -> None:
        """A plan can be replayed from now on."""
        self.plans.append(plan)
        self.captures += 1
        self.capture_seconds += plan.seconds
        plans_made.count += 1
        if self.on_plan is not None:
            self.on_plan(plan)

    @property
    def replays(self) -> int:
        """Calls served by a plan, those that captured it not included."""
        return self.retired_replays + sum(plan.replays for plan in self.plans)

    def absorb(self, gone: RunnerStats) -> None:
        """Go on counting where a runner that is gone has ended, whose plans went with it."""
        self.live_calls.update(gone.live_calls)
        self.moves.update(gone.moves)
        self.failures += gone.failures
        self.divergences += gone.divergences
        self.unchecked |= gone.unchecked
        self.recaptures += gone.recaptures
        self.evictions += gone.evictions
        self.captures += gone.captures
        self.capture_seconds += gone.capture_seconds
        self.retired_replays += gone.replays
        self.dim_names = self.dim_names or gone.dim_names
        if self.dim_names == gone.dim_names:
            for each in gone.sizes.values():
                counted = self.of_size(each.size, each.rung)
                counted.replays += each.replays
                counted.live += each.live

    def retire(self, plan: PlanStats) -> None:
        """Take a dropped plan out of the list, keeping its replays in the total."""
        self.plans = [each for each in self.plans if each is not plan]
        self.retired_replays += plan.replays
        self.evictions += 1
