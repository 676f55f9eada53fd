"""What a runner counts while it runs, for reports. Counting is always on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


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
        key: the values of the inputs that are part of the key.
        mode: ``"FULL"`` or ``"PIECEWISE"``: what was asked of this plan.
        num_segments: how many graphs one replay launches.
        captured: names of the steps inside the graphs.
        live: names of the steps that run live, each with the reason.
        bytes: growth of device memory by the capture, graphs and pool together; shared memory counts for the first.
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


@dataclass(slots=True)
class RunnerStats:
    """One region.

    Attributes:
        plans: those that can be replayed now.
        live_calls: calls without a graph, by reason.
        failures: captures that failed, each with what happened.
        recaptures: plans captured again because a static address had moved.
        evictions: plans dropped.
        retired_replays: replays of plans that are no longer in ``plans``.
        bindings: how each input gets into the graph, by its name, for the latest plan.
        moves: how often the address of a static input changed, by its name.
        on_plan: told of each plan when it has been captured.
    """

    plans: list[PlanStats] = field(default_factory=list)
    live_calls: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    recaptures: int = 0
    evictions: int = 0
    retired_replays: int = 0
    bindings: dict[str, str] = field(default_factory=dict)
    moves: Counter[str] = field(default_factory=Counter)
    on_plan: Callable[[PlanStats], None] | None = field(default=None, repr=False)

    def add(self, plan: PlanStats) -> None:
        """A plan can be replayed from now on."""
        self.plans.append(plan)
        plans_made.count += 1
        if self.on_plan is not None:
            self.on_plan(plan)

    @property
    def replays(self) -> int:
        """Calls served by a plan, those that captured it not included."""
        return self.retired_replays + sum(plan.replays for plan in self.plans)

    def retire(self, plan: PlanStats) -> None:
        """Take a dropped plan out of the list, keeping its replays in the total."""
        self.plans = [each for each in self.plans if each is not plan]
        self.retired_replays += plan.replays
        self.evictions += 1
