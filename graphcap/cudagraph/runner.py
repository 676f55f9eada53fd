"""What happens when a region is called: replay, or the way to a plan, or a live run, and what is remembered of it.

A call is known by its sizes, and by the ``step`` in force. The first call of each kind
finds its route (``routes.py``); where that leads to a plan, the way is kept in one table, so that
the next such call is one look-up and one replay. Plans are made by :mod:`~graphcap.cudagraph.maker`.
"""

from __future__ import annotations

import contextlib
import operator
import weakref
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from typing import Any

import torch

from graphcap.config import Config
from graphcap.cudagraph.agreement import agreement_of
from graphcap.cudagraph.checks.verify import Inspector
from graphcap.cudagraph.counters.alerts import warn_once
from graphcap.cudagraph.counters.stats import PlanStats, RunnerStats, SizeStats
from graphcap.cudagraph.dispatch.metadata import Serving
from graphcap.cudagraph.dispatch.phase import Phase, current_purpose
from graphcap.cudagraph.dispatch.revision import revise
from graphcap.cudagraph.dispatch.route import Route
from graphcap.cudagraph.dispatch.routes import Router
from graphcap.cudagraph.dispatch.step import current, step
from graphcap.cudagraph.hardware.device import GraphDevice
from graphcap.cudagraph.made import ELSEWHERE
from graphcap.cudagraph.maker import PlanMaker
from graphcap.cudagraph.outlook import Outlook
from graphcap.cudagraph.padded.padding import Padding
from graphcap.cudagraph.parts import Parts
from graphcap.cudagraph.program import InputKind, Program
from graphcap.cudagraph.recording.attempts import Attempts
from graphcap.cudagraph.recording.moves import MoveRecord
from graphcap.cudagraph.replaying.plan import Plan, Served, Unfit
from graphcap.cudagraph.replaying.plan_table import PlanTable

_ALERT_EVERY = 128  #: live calls between two looks at the counters
_MAX_REPLACED = 2  #: how often a plan gives way to one for another layout of the inputs under the same key


class GraphRunner:
    """Calls a program, through a graph where there is one.

    ``runner(*args)`` takes one value per input of the program and returns the tuple of its outputs, always those of
    ``program.run(*args)``. :meth:`call_with` is the same. Safe to call from several threads and streams.

    Attributes:
        program: what is called.
        device: where it is captured.
        stats: counters and the list of plans.
        padding: which sizes may be padded.
        router: finds the mode and the sizes for a call.
        outlook: says what is going to happen.
        agreement: with whom it decides.
        parameters: of the model's instance that it is for; none where it is for any.
    """

    def __init__(self, program: Program, device: GraphDevice, config: Config) -> None:
        self.program = program
        self.device = device
        self.parameters: Sequence[weakref.ref[torch.Tensor]] = ()
        self.stats = RunnerStats()
        self.padding = Padding(program, config)
        self.router = Router(program, config, self.padding)
        self.stats.dim_names = self.router.dims.names
        self._sizes = _size_reader(program)
        self._table = PlanTable(self.stats)
        self._attempts = Attempts(program, config, self.stats)
        self._moves = MoveRecord(program, config)
        self.agreement = agreement_of(config.process_group)
        parts = Parts(
            program, device, config, self.padding, self.router, self._table, self._attempts, self._moves,
            self.stats, self.agreement,
        )  # fmt: skip
        self._maker = PlanMaker(parts)
        self.outlook = Outlook(parts, self._maker)
        self._replaced: dict[Hashable, int] = {}
        self._tick = device.account.tick
        self._written = sorted({slot for each in program.steps for slot in each.mutates if slot < len(program.inputs)})

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        return self.call_with(args)

    def call_with(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """A call with these arguments. A list may be used for something else afterwards."""
        said = current()
        key = self._sizes(args) if said is None else (self._sizes(args), said.token)
        served = self._table.served.get(key)
        if served is None:
            return self._first_of_its_kind(key, tuple(args), said)
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self.call_with(args)
        device = self.device
        with device.lock:
            if device.busy or not device.enter():
                result: Any = None
            else:
                device.busy = True
                try:
                    result = served.replay(args)
                finally:
                    device.busy = False
        if result.__class__ is tuple:
            served.stats.replays += 1
            served.size.replays += 1
            served.holding.last_use = self._tick()
            served.plan.num_changed = 0
            return result
        return self._unfit(served.plan, result, tuple(args), said)

    def foresee(self, *args: Any) -> PlanStats | str:
        """What is going to happen to a call with these arguments: see :meth:`Outlook.of_call`."""
        return self.outlook.of_call(self._sizes(args), args)

    @property
    def captured(self) -> frozenset[Hashable]:
        """The routes that have a plan, or have lost it to weights that moved, by their keys."""
        return frozenset(self._table.plans) | self._attempts.lost

    def replaces(self, captured: Collection[Hashable]) -> None:
        """Serve in the place of a runner that is gone, with its weights, and had captured these: they are captured
        again even where captures are not allowed."""
        self._attempts.note_lost(captured)
        revise()

    def release(self) -> None:
        """Drop every plan; the pool goes with the last plan on the device. Later calls capture again."""
        with self.device.lock:
            self._wait()
            self._table.drop_if(lambda plan: True)
            self._maker.clear()

    def _wait(self) -> None:
        """Until the replays that are running have finished: their plans may go."""
        if self._table.plans and self.device.enter():
            self.device.wait()

    def reconsider(self) -> None:
        """Try again what was given up for want of memory: plans, and the proof that padding changes nothing. The next
        call of each kind looks for its plan again, so that a ``Keeper`` sees it."""
        with self.device.lock:
            self._wait()
            self._maker.reconsider()
            self._table.forget_ways()

    @property
    def inspector(self) -> Inspector:
        """Looks into the replays of every plan that is captured from now on."""
        return self._maker.capture.inspector

    @contextlib.contextmanager
    def inspected(self, inspector: Inspector) -> Iterator[None]:
        """Within this block calls make plans of their own, for ``inspector`` to look into; the others return at its
        end."""
        with self._table.set_aside(), self._maker.capture.inspected(inspector):
            yield

    def _live(self, args: tuple[Any, ...], reason: str) -> tuple[Any, ...]:
        self._note_live(args, reason)
        return self.program.run(*args)

    def _note_live(self, args: tuple[Any, ...], reason: str) -> None:
        self.stats.live_calls[reason] += 1
        self._size_stats(args).live += 1
        if self.stats.live_calls.total() % _ALERT_EVERY == 0:
            warn_once(self.program.name, self.stats)

    def _first_of_its_kind(self, key: Hashable, args: tuple[Any, ...], said: step | None) -> tuple[Any, ...]:
        """No way is known for such a call."""
        if (keeper := current_purpose().keeper) is not None:
            inputs = self.program.inputs
            states = [i for i in self._written if inputs[i].kind is InputKind.STATIC or id(args[i]) in keeper.lent]
            keeper.keep(args[index] for index in states)
        plan, route, reason = self.outlook.way(self._sizes(args), args, said)
        if plan is not None:
            return self._serve(key, plan, args)
        return self._live(args, reason) if route is None else self._approach(route, args, said)

    def _serve(self, key: Hashable, plan: Plan, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Keep the way from this kind of call to its plan, and go it."""
        replay = plan.fit(self.padding.sizes(args) or {})
        if plan.serving is not None and plan.serving.is_used:
            replay = _with_inputs(replay, plan.serving)
        self._table.lead(Served(replay, plan, key, plan.stats, plan.holding, self._size_stats(args, plan.route)))
        return self.call_with(args)

    def _approach(self, route: Route, args: tuple[Any, ...], said: step | None) -> tuple[Any, ...]:
        """A route that may be captured: now, or after more sightings."""
        phase = current_purpose().phase
        if phase is Phase.TRAFFIC and not self._attempts.is_due(route):
            return self._live(args, "warm-up")
        if phase is Phase.WARM_UP:
            self._maker.forget(route.key)
        return self._make(route, args, said)

    def _make(self, route: Route, args: tuple[Any, ...], said: step | None) -> tuple[Any, ...]:
        made = self._maker.serve(route, args, said)
        if made.reason:
            self._note_live(args, made.reason)
        else:
            warn_once(self.program.name, self.stats)
        return made.outputs

    def _unfit(self, plan: Plan, why: Unfit | None, args: tuple[Any, ...], said: step | None) -> tuple[Any, ...]:
        """A plan exists and could not serve the call. Nothing has run yet."""
        if why is None:
            return self._live(args, self.device.unusable or ELSEWHERE)
        route = plan.route
        if self.agreement.is_group:  # all ranks come here, or the group is told that they do not
            question = f"{self.program.name}: an input does not fit the plan {route.mode.name} {route.sizes}"
            everybody = self.agreement.gather(question, why.name)
            why = Unfit.MOVED if Unfit.MOVED.name in everybody else why
        if why is Unfit.MOVED:
            self._moves.note(plan.addresses, args, self._calls(), self.stats)
            self._table.drop(route.key)
            self._attempts.note_lost([route.key])
            self.stats.recaptures += 1
            return self._make(route, args, said)
        plan.num_changed += 1
        if plan.num_changed >= self._attempts.due(route) and self._replaced.get(route.key, 0) < _MAX_REPLACED:
            self._replaced[route.key] = self._replaced.get(route.key, 0) + 1
            self._table.drop(route.key)
        return self._live(args, why.value)

    def _size_stats(self, args: tuple[Any, ...], route: Route | None = None) -> SizeStats:
        """The counter of a call: at the sizes of the route that serves it, or else of the rung that would."""
        sizes = tuple(self.router.dims.sizes(self._sizes(args)).values())
        return self.stats.of_size(sizes, self.router.dims.rung_of(sizes) if route is None else route.computed(sizes))

    def _calls(self) -> int:
        return self.stats.replays + self.stats.live_calls.total()


def _with_inputs(replay: Callable[[Sequence[Any]], Any], serving: Serving) -> Callable[[Sequence[Any]], Any]:
    """A replay that brings the step's inputs to where the plan reads them."""

    def with_inputs(args: Sequence[Any]) -> Any:
        said = current()
        if said is None:
            return Unfit.CHANGED
        serving.refresh(said.inputs)
        with serving:
            return replay(args)

    return with_inputs


def _size_reader(program: Program) -> Callable[[Sequence[Any]], Any]:
    """The function that takes the arguments and returns the sizes of the key: ``()``, the only one, or a tuple."""
    where = [i for i, spec in enumerate(program.inputs) if spec.kind is InputKind.SCALAR and spec.in_key]
    return operator.itemgetter(*where) if where else lambda args: ()
