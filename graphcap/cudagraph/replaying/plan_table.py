"""The plans of one runner, and the ways from calls to them."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Hashable, Iterator

from graphcap.cudagraph.counters.stats import RunnerStats
from graphcap.cudagraph.dispatch.revision import revise
from graphcap.cudagraph.replaying.plan import Plan, Served

_MAX_SERVED = 65536  #: kinds of calls remembered


class PlanTable:
    """What can be replayed now.

    Attributes:
        plans: by the key of their route.
        served: the ways to them, by the key of the call.
    """

    def __init__(self, stats: RunnerStats) -> None:
        self.plans: dict[Hashable, Plan] = {}
        self.served: dict[Hashable, Served] = {}
        self._stats = stats

    def add(self, plan: Plan) -> None:
        """A plan can be replayed from now on."""
        self.plans[plan.route.key] = plan
        self._stats.add(plan.stats)
        revise()

    def lead(self, served: Served) -> None:
        """A kind of call leads to its plan from now on."""
        if len(self.served) >= _MAX_SERVED:
            self.forget_ways()
        self.served[served.key] = served
        served.plan.served.append(served.key)  # the key alone: no cycle that would wait for the collector

    def drop(self, key: Hashable) -> None:
        """Give up a plan and every way to it."""
        plan = self.plans.pop(key, None)
        if plan is not None:
            for served in plan.served:
                self.served.pop(served, None)
            plan.holding.is_dropped = True
            self._stats.retire(plan.stats)
            revise()

    def dropper(self, key: Hashable) -> Callable[[], None]:
        """How the account gives up a plan; it does not keep the table alive."""
        reference = weakref.ref(self)

        def drop() -> None:
            if (table := reference()) is not None:
                table.drop(key)

        return drop

    def drop_if(self, condition: Callable[[Plan], bool]) -> None:
        """Give up the plans for which a condition holds."""
        for key, plan in list(self.plans.items()):
            if condition(plan):
                self.drop(key)

    def forget_ways(self) -> None:
        """Have the next call of each kind look for its plan again."""
        for plan in self.plans.values():
            plan.served.clear()
        self.served.clear()

    @property
    def num_undeclared(self) -> int:
        """How many plans are for shapes that are not on the ladder."""
        return sum(not plan.route.is_declared for plan in self.plans.values())

    @contextlib.contextmanager
    def set_aside(self) -> Iterator[None]:
        """An empty table within this block; what was in it comes back at its end."""
        before = self.plans, self.served
        self.plans, self.served = {}, {}
        revise()
        try:
            yield
        finally:
            self.drop_if(lambda plan: True)
            self.plans, self.served = before
            revise()
