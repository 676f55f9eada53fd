"""A capture that worked out becomes a plan: its replay is written, and what it took is put down."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from graphcap import native
from graphcap.cache_root import cache_root
from graphcap.cudagraph.checks.annotate import annotate
from graphcap.cudagraph.checks.verify import Inspector
from graphcap.cudagraph.counters.stats import PlanStats
from graphcap.cudagraph.dispatch.asked import Asked
from graphcap.cudagraph.dispatch.metadata import Serving, dims_of_step
from graphcap.cudagraph.dispatch.route import Route
from graphcap.cudagraph.dispatch.step import current
from graphcap.cudagraph.hardware.account import Holding, Usage
from graphcap.cudagraph.padded.fitted import Fitter
from graphcap.cudagraph.parts import Parts
from graphcap.cudagraph.recording.arena import Arena
from graphcap.cudagraph.recording.recorded import Recorded
from graphcap.cudagraph.replaying.plan import Plan, static_addresses
from graphcap.cudagraph.replaying.replay import generate


class PlanWriter:
    """Writes the plans of one runner."""

    def __init__(self, parts: Parts, arena: Arena) -> None:
        """``arena`` is where copied inputs lie."""
        self._program, self._device, self._config = parts.program, parts.device, parts.config
        self._padding, self._table, self._attempts, self._stats = (
            parts.padding, parts.table, parts.attempts, parts.stats,
        )  # fmt: skip
        self._arena = arena
        self._step_dims = dims_of_step(parts.config.dynamic_arg_dims)

    def write(
        self,
        route: Route,
        recorded: Recorded,
        holding: Holding,
        grown: Usage,
        seconds: float,
        serving: Serving | None,
        inspector: Inspector,
    ) -> Plan:
        """The plan of a capture.

        Args:
            route: what it is good for.
            recorded: the capture.
            holding: its entry in the account of the device.
            grown: the memory that it took.
            seconds: how long it took.
            serving: the buffers of the step inputs that it reads, if any.
            inspector: looks into its replays.
        """
        stats = _plan_stats(route, recorded, grown, seconds)
        replay, fitter = self._replay(route, recorded, stats, inspector)
        addresses = static_addresses(recorded)
        plan = Plan(route, replay, stats.source, addresses, recorded, stats, holding, serving, fitter=fitter)
        if _may_read_step(recorded):
            plan.asked = Asked.of(current(), recorded.seen.decisive(self._step_dims))
        return plan

    def _replay(
        self, route: Route, recorded: Recorded, stats: PlanStats, inspector: Inspector
    ) -> tuple[Callable[[Sequence[Any]], Any], Fitter | None]:
        """Write the replay of what was recorded."""
        at_end = self._device.at_end(recorded.segments, recorded.outputs.lent())
        if at_end is not None:
            at_end()
        itself = weakref.ref(self)  # so that a runner that nobody calls any more goes at once, its plans with it

        def mismatch(reason: str) -> None:
            if (writer := itself()) is not None:
                writer._give_up(route, reason)

        fitter = Fitter(self._padding, route.rung, recorded, self._arena) if route.rung else None
        replay, stats.source = generate(recorded, at_end, mismatch, self._arena if self._padding else None, fitter)
        if self._config.annotate:  # first, so that it is still there when a check ends
            annotate(replay, recorded, self._device.device.type == "cuda")
        inspector.attach(route.key, recorded, replay)
        bound = zip(self._program.inputs, recorded.layout.bindings, strict=True)
        self._stats.bindings = {spec.name: binding.value for spec, binding in bound}
        if self._device.device.type == "cuda" and self._config.cache:
            native.prepare(cache_root(self._config.cache_dir))
        return replay, fitter

    def _give_up(self, route: Route, reason: str) -> None:
        """A live step gave what the graphs of a plan cannot take: a plan for this route is of no use."""
        self._stats.live_calls[reason] += 1
        self._attempts.refuse(route, reason)
        self._table.drop(route.key)


def _may_read_step(recorded: Recorded) -> bool:
    """Whether a step of the plan may read what no argument shows: what runs live, and what is captured on trust."""
    live = recorded.layout.live
    return bool(live) or any(each.unproven for each in recorded.program.steps)


def _plan_stats(route: Route, recorded: Recorded, grown: Usage, seconds: float) -> PlanStats:
    steps, live = recorded.program.steps, recorded.layout.live
    return PlanStats(
        key=route.sizes,
        mode=route.mode.name,
        num_segments=len(recorded.segments),
        captured=[each.name for number, each in enumerate(steps) if number not in live],
        live={each.name: live[number] for number, each in enumerate(steps) if number in live},
        bytes=grown.exclusive + grown.shared,
        seconds=seconds,
        exclusive_bytes=grown.exclusive,
        shared_bytes=grown.shared,
    )
