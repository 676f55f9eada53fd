"""What a runner counts while it runs, for reports. Counting is always on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

_MAX_SIZES = 65536


@dataclass(slots=True)
class SizeHits:
    """Calls of one size that one plan has served.

    Attributes:
        sizes: of the key, as the calls had them.
        count: how many calls.
    """

    sizes: tuple[int, ...]
    count: int = 0


@dataclass(slots=True)
class PlanStats:
    """One captured shape.

    Attributes:
        key: the sizes that it was captured at; ``None`` for one that it does not depend on.
        mode: ``"FULL"`` or ``"PIECEWISE"``: what was asked of this plan.
        num_segments: how many graphs one replay launches.
        captured: names of the steps inside the graphs.
        live: names of the steps that run live, each with the reason.
        bytes: growth of device memory by the capture, graphs and pool together; shared memory counts for the first.
        seconds: how long the capturing call took.
        hits: how often the plan has run since, by the sizes of the calls.
        source: the generated replay function.
    """

    key: tuple[Any, ...]
    mode: str
    num_segments: int
    captured: list[str]
    live: dict[str, str]
    bytes: int
    seconds: float
    hits: list[SizeHits] = field(default_factory=list)
    source: str = field(default="", repr=False)

    @property
    def replays(self) -> int:
        """How often the plan has run since it was captured."""
        return sum(each.count for each in self.hits)


@dataclass(slots=True)
class RunnerStats:
    """One region.

    Attributes:
        plans: those that can be replayed now.
        live_calls: calls without a graph, by reason.
        failures: captures that failed, each with what happened.
        recaptures: plans captured again because a static address had moved.
        evictions: plans dropped.
        retired: replays of plans that are no longer in ``plans``, by the sizes of the calls and of the plan.
        live_sizes: calls without a graph, by size.
        bindings: how each input gets into the graph, by its name, for the latest plan.
        moves: how often the address of a static input changed, by its name.
        on_plan: told of each plan when it has been captured.
    """

    plans: list[PlanStats] = field(default_factory=list)
    live_calls: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    recaptures: int = 0
    evictions: int = 0
    retired: Counter[tuple[tuple[Any, ...], tuple[Any, ...]]] = field(default_factory=Counter)
    live_sizes: Counter[tuple[Any, ...]] = field(default_factory=Counter)
    bindings: dict[str, str] = field(default_factory=dict)
    moves: Counter[str] = field(default_factory=Counter)
    on_plan: Callable[[PlanStats], None] | None = field(default=None, repr=False)

    def add(self, plan: PlanStats) -> None:
        """A plan can be replayed from now on."""
        self.plans.append(plan)
        if self.on_plan is not None:
            self.on_plan(plan)

    @property
    def replays(self) -> int:
        """Calls served by a plan, those that captured it not included."""
        return self.retired.total() + sum(plan.replays for plan in self.plans)

    def note_live(self, reason: str, sizes: Any) -> None:
        """A call without a graph. Of sizes beyond the first :data:`_MAX_SIZES` only the reason is counted."""
        self.live_calls[reason] += 1
        sizes = sizes if isinstance(sizes, tuple) else (sizes,)
        if sizes in self.live_sizes or len(self.live_sizes) < _MAX_SIZES:
            self.live_sizes[sizes] += 1

    def retire(self, plan: PlanStats) -> None:
        """Take a dropped plan out of the list, keeping its replays in the total."""
        self.plans = [each for each in self.plans if each is not plan]
        for each in plan.hits:
            self.retired[each.sizes, plan.key] += each.count
        self.evictions += 1
