"""What is going to happen to a call or a batch: which plan it finds, whether it leads to one, or why it runs live.

The runner asks it about every call of a new kind and then does what it says; engines ask it before the call. Nothing
here runs the program.
"""

from __future__ import annotations

from typing import Any

from graphcap.config import CUDAGraphMode
from graphcap.cudagraph.counters.stats import PlanStats
from graphcap.cudagraph.dispatch.key import Dispatch, GraphKey
from graphcap.cudagraph.dispatch.route import Route
from graphcap.cudagraph.dispatch.step import current, step
from graphcap.cudagraph.maker import PlanMaker
from graphcap.cudagraph.parts import Parts
from graphcap.cudagraph.replaying.plan import Plan


class Outlook:
    """The outlook of one runner."""

    def __init__(self, parts: Parts, maker: PlanMaker) -> None:
        self._router, self._table, self._attempts = parts.router, parts.table, parts.attempts
        self._is_group = parts.agreement.is_group
        self._maker = maker

    # -- of a call -----------------------------------------------------------------------------------------------------

    def of_call(self, sizes: Any, args: tuple[Any, ...]) -> PlanStats | str:
        """How a call with these arguments is going to be served, as far as can be told before: the plan that it finds,
        why it runs without one, or ``""`` where it leads to one.

        Args:
            sizes: of the call, as its key has them.
            args: of the call.
        """
        said = current()
        served = self._table.served.get(sizes if said is None else (sizes, said.token))
        if served is not None:
            return served.stats
        plan, _, reason = self.way(sizes, args, said)
        return reason if plan is None else plan.stats

    def way(self, sizes: Any, args: tuple[Any, ...], said: step | None) -> tuple[Plan | None, Route | None, str]:
        """The plan that serves a call, with its route; or ``None`` and the route on which the call comes to one; or
        neither, and why. ``sizes`` and ``args`` as above, ``said``: the step in force."""
        routes = self._router.routes(sizes, said)
        if isinstance(routes, str):
            return None, None, routes
        reasons = []
        for route in routes:
            plan, way, reason = self._on_route(route, args, said)
            if plan is not None or not reason:
                return plan, way, ""
            reasons.append(reason)
        return None, None, reasons[0]

    def _on_route(self, route: Route, args: tuple[Any, ...], said: step | None) -> tuple[Plan | None, Route, str]:
        """The plan that serves a call on a route; or ``None``, the route on which the call comes to one, and why it
        does not, ``""`` where it does."""
        plan = self._table.plans.get(route.key)
        if plan is None:
            return None, route, self._barred(route, said)
        if reason := plan.why_not_for(said):
            return None, route, reason
        if self._maker.may_serve(plan, route, args, said):
            return plan, route, ""
        way = self._maker.way_to(plan, route, args, said)
        return None, way, "" if plan.route.covers(way) else self._barred(way, said)

    def _barred(self, route: Route, said: step | None) -> str:
        return (
            self._attempts.barred(route, self._table.num_undeclared)
            or self._maker.why_not_together(route, said)
            or self._maker.no_room(route)
        )

    # -- of a batch ----------------------------------------------------------------------------------------------------

    def dispatch(self, key: GraphKey, max_mode: CUDAGraphMode | None) -> Dispatch:
        """How a batch is going to run: by the first of its routes that has a plan or may get one."""
        return self.decide(key, max_mode)[0]

    def decide(self, key: GraphKey, max_mode: CUDAGraphMode | None) -> tuple[Dispatch, bool]:
        """:meth:`dispatch`, and whether that holds until the next ``revise``. It does not where the device has no room:
        that is asked about again after some calls, so calls are counted."""
        routes = self._router.routes_of(key, max_mode)
        reasons, lasts = [routes] if isinstance(routes, str) else [], True
        for route in () if isinstance(routes, str) else routes:
            plan = self._table.plans.get(route.key)
            if plan is not None and route.padded_in(self._router.dims.sizes_of(key)) <= plan.route.rung.keys():
                return self._router.dispatch(route, key), lasts
            barred = self._attempts.barred(route, self._table.num_undeclared)
            no_room = "" if barred else self._maker.no_room(route)
            lasts = lasts and not no_room
            if not barred and not no_room:
                return self._router.dispatch(route, key), lasts
            reasons.append(barred or no_room)
        return Dispatch(CUDAGraphMode.NONE, key.num_tokens, key.num_reqs, key, reasons[0], key.sizes), lasts

    def has_plan(self, key: GraphKey) -> bool:
        """Whether a batch finds a plan."""
        return any(route.key in self._table.plans for route in self._routes_of(key))

    def lacks_proof(self, key: GraphKey) -> bool:
        """Whether a batch finds a plan that it has to be padded for, and that is not proven yet."""
        for route in self._routes_of(key):
            if (plan := self._table.plans.get(route.key)) is not None:
                return self._maker.lacks_proof(plan, route, key)
        return False

    def is_told_by_others(self, key: GraphKey) -> bool:
        """Whether other batches of its kind show all there is to know of a batch: one more warm-up would show nothing.
        In a group ranks need not know the same."""
        if self._is_group:
            return False
        unmade = [route for route in self._routes_of(key) if route.key not in self._table.plans]
        return any(map(self._maker.is_told_by_others, unmade))

    def _routes_of(self, key: GraphKey) -> tuple[Route, ...]:
        routes = self._router.routes_of(key, None)
        return () if isinstance(routes, str) else tuple(routes)
