"""What happens when a region is called: replay, capture, or run live, and what is remembered for the next call.

A call is known by its sizes, and by the :class:`~graphcap.cudagraph.step.step` in force. The first call of each kind
finds its route (:mod:`~graphcap.cudagraph.routes`); where that leads to a plan, the way is kept in one table, so that
the next such call is one look-up and one replay.
"""

from __future__ import annotations

import contextlib
import logging
import operator
import os
import time
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch

from graphcap import native
from graphcap.cache_root import cache_root
from graphcap.config import Config, CUDAGraphMode
from graphcap.cudagraph.annotate import annotate
from graphcap.cudagraph.arena import Arena
from graphcap.cudagraph.attempts import Attempts
from graphcap.cudagraph.bindings import Choice
from graphcap.cudagraph.budget import Holding, Room, Usage
from graphcap.cudagraph.capture import SegmentedCapture
from graphcap.cudagraph.device import GraphDevice
from graphcap.cudagraph.handout import Policy
from graphcap.cudagraph.layout import Layout, lay_out
from graphcap.cudagraph.metadata import Serving, dims_of_step
from graphcap.cudagraph.moves import MoveRecord
from graphcap.cudagraph.observe import Observation, observe, signature_of
from graphcap.cudagraph.padding import Padding
from graphcap.cudagraph.phase import Phase, current_purpose
from graphcap.cudagraph.plan import Plan, Served, Unfit, static_addresses
from graphcap.cudagraph.program import InputKind, Program
from graphcap.cudagraph.recorded import Failure, Recorded
from graphcap.cudagraph.replay import generate
from graphcap.cudagraph.routes import FULL, Route, Router
from graphcap.cudagraph.stats import PlanStats, RunnerStats, SizeStats
from graphcap.cudagraph.step import Dispatch, GraphKey, current, step
from graphcap.cudagraph.verify import Checks, Inspector
from graphcap.environment import check_outputs_wanted
from graphcap.progress import Progress

_log = logging.getLogger("graphcap.cudagraph")

_MAX_REPLACED = 2  #: how often a plan gives way to one for another layout of the inputs under the same key
_MAX_SERVED = 65536  #: kinds of calls remembered


class GraphRunner:
    """Calls a program, through a graph where there is one.

    ``runner(*args)`` takes one value per input of the program and returns the tuple of its outputs, always those of
    ``program.run(*args)``. Safe to call from several threads and streams.

    Attributes:
        stats: counters and the list of plans.
        router: finds the mode and the sizes for a call.
        inspector: looks into replays; to exchange it, drop the plans (:meth:`release`) as well.
    """

    def __init__(self, program: Program, device: GraphDevice, config: Config) -> None:
        self.stats = RunnerStats()
        self._program = program
        self._device = device
        self._config = config
        self._policy = Policy.of(config, config.debug_dir is not None or check_outputs_wanted(os.environ))
        self.router = Router(program, config, Padding(program, config))
        self.stats.dim_names = self.router.names
        self._sizes = _size_reader(program)
        self._served: dict[Hashable, Served] = {}
        self._plans: dict[Hashable, Plan] = {}
        self._servings: dict[Hashable, Serving] = {}
        self._arena = Arena(device)
        self._attempts = Attempts(program, config, self.stats)
        self._observations: dict[Hashable, Observation] = {}
        self._replaced: dict[Hashable, int] = {}
        self._moves = MoveRecord(program, config)
        self._room = Room(device, config.max_graph_bytes)
        self._tick = device.account.tick
        self.inspector: Inspector = Checks(program, config.verify, self.stats, self._distrust, self._drop_key)
        self._step_dims = dims_of_step(config.dynamic_arg_dims)
        mutated = {slot for each in program.steps for slot in each.mutates}
        self._state = [i for i, spec in enumerate(program.inputs) if i in mutated and spec.kind is InputKind.STATIC]

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        said = current()
        key = self._sizes(args) if said is None else (self._sizes(args), said.token)
        served = self._served.get(key)
        if served is None:
            return self._first_of_its_kind(key, args, said)
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self(*args)
        device = self._device
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
        return self._unfit(served.plan, result, args, said)

    def dispatch(self, key: GraphKey, max_mode: CUDAGraphMode | None) -> Dispatch:
        """How a batch is going to run: by the first of its routes that has a plan or may get one."""
        routes = self.router.routes_of(key, max_mode)
        reasons = [routes] if isinstance(routes, str) else []
        for route in () if isinstance(routes, str) else routes:
            barred = "" if route.key in self._plans else self._barred(route)
            if not barred:
                padded = self.router.padded_sizes(route, key)
                return Dispatch(route.mode, *padded, key)
            reasons.append(barred)
        return Dispatch(CUDAGraphMode.NONE, key.num_tokens, key.num_reqs, key, reasons[0])

    def used_bytes(self) -> int:
        """Memory of the device in use, that of graphs included."""
        return self._device.used_bytes()

    def has_plan(self, key: GraphKey) -> bool:
        """Whether a batch finds a plan."""
        routes = self.router.routes_of(key, None)
        return not isinstance(routes, str) and any(each.key in self._plans for each in routes)

    def release(self) -> None:
        """Drop every plan; the pool goes with the last plan on the device. Later calls capture again."""
        with self._device.lock:
            if self._plans and self._device.enter():
                self._device.wait()
            for plan in list(self._plans.values()):
                self._drop(plan)
            self._servings.clear()
            self._arena = Arena(self._device)
            self._room.clear()

    def _why_not_here(self) -> str:
        return self._device.unusable or "inside another capture or replay"

    @contextlib.contextmanager
    def inspected(self, inspector: Inspector) -> Iterator[None]:
        """Within this block calls make plans of their own, for ``inspector`` to look into; the others return at its
        end."""
        with self._device.lock:
            before = self._plans, self._served, self.inspector
            self._plans, self._served, self.inspector = {}, {}, inspector
        try:
            yield
        finally:
            with self._device.lock:
                for plan in list(self._plans.values()):
                    self._drop(plan)
                self._plans, self._served, self.inspector = before

    @property
    def program(self) -> Program:
        """What is called."""
        return self._program

    @property
    def device(self) -> GraphDevice:
        """Where it is captured."""
        return self._device

    def _live(self, args: tuple[Any, ...], reason: str) -> tuple[Any, ...]:
        self.stats.live_calls[reason] += 1
        self._size_stats(self._sizes(args)).live += 1
        return self._program.run(*args)

    def _unfit(self, plan: Plan, why: Unfit | None, args: tuple[Any, ...], said: step | None) -> tuple[Any, ...]:
        """A plan exists and could not serve the call. Nothing has run yet."""
        if why is None:
            return self._live(args, self._why_not_here())
        route = plan.route
        if why is Unfit.MOVED:
            self._moves.note(plan.addresses, args, self._calls(), self.stats)
            self._drop(plan)
            self.stats.recaptures += 1
            return self._capture_when_known(route, args, said)
        plan.num_changed += 1
        if plan.num_changed >= self._attempts.due(route) and self._replaced.get(route.key, 0) < _MAX_REPLACED:
            self._replaced[route.key] = self._replaced.get(route.key, 0) + 1
            self._drop(plan)
        return self._live(args, why.value)

    def _first_of_its_kind(self, key: Hashable, args: tuple[Any, ...], said: step | None) -> tuple[Any, ...]:
        """No way is known for such a call."""
        routes = self.router.routes(self._sizes(args), said)
        if isinstance(routes, str):
            return self._live(args, routes)
        reasons = []
        for route in routes:
            plan = self._plans.get(route.key)
            if plan is not None:
                return self._serve(key, plan, args)
            reasons.append(self._barred(route))
            if not reasons[-1]:
                return self._approach(route, args, said)
        return self._live(args, reasons[0])

    def _size_stats(self, sizes: Any) -> SizeStats:
        sizes = sizes if isinstance(sizes, tuple) else (sizes,)
        return self.stats.of_size(sizes, self.router.rung_of(sizes))

    def _barred(self, route: Route) -> str:
        num_undeclared = sum(not each.route.is_declared for each in self._plans.values())
        return self._attempts.barred(route, num_undeclared) or self._room.closed(route.key)

    def _serve(self, key: Hashable, plan: Plan, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Keep the way from this kind of call to its plan, and go it."""
        if len(self._served) >= _MAX_SERVED:
            self._served.clear()
        replay = plan.replay
        if plan.serving is not None and len(plan.serving):
            replay = _with_inputs(replay, plan.serving)
        size = self._size_stats(self._sizes(args))
        self._served[key] = served = Served(replay, plan, key, plan.stats, plan.holding, size)
        plan.served.append(served)
        return self(*args)

    def _approach(self, route: Route, args: tuple[Any, ...], said: step | None) -> tuple[Any, ...]:
        """A route that may be captured: now, or after more sightings."""
        purpose = current_purpose()
        if purpose.phase is Phase.TRAFFIC and not self._attempts.is_due(route):
            return self._live(args, "warm-up")
        if purpose.phase is Phase.WARM_UP:
            self._observations.pop(route.key, None)
        if purpose.keeper is not None:
            purpose.keeper.keep(args[index] for index in self._state)
        return self._capture_when_known(route, args, said)

    def _capture_when_known(self, route: Route, args: tuple[Any, ...], said: step | None) -> tuple[Any, ...]:
        """Capture, if an earlier call has shown how values share memory; otherwise let this call show it."""
        known = self._observations.get(route.key)
        serving = self._serving_of(route, said)
        with serving or contextlib.nullcontext():
            if known is None or known.signature != self._signature(route, args):
                self.stats.live_calls["warm-up"] += 1
                self._size_stats(self._sizes(args)).live += 1
                captured = self.router.captured(route)
                self._observations[route.key], outputs = observe(self._program, args, self._device.device, captured)
                return outputs
            device = self._device
            with device.lock:
                if device.busy or not device.enter():
                    return self._live(args, self._why_not_here())
                if route.key in self._plans:  # another thread was faster
                    return self(*args)
                layout = self._lay_out(known, route)
                if len(layout.live) == len(self._program.steps):
                    reason = f"nothing to capture: {next(iter(layout.live.values()), 'no steps')}"
                    self._attempts.refuse(route, reason)
                    return self._live(args, reason)
                if reason := self._room.make(route.key):
                    return self._live(args, reason)
                device.busy = True
                try:
                    return self._capture(route, known, layout, args, serving)
                finally:
                    device.busy = False

    def _signature(self, route: Route, args: tuple[Any, ...]) -> Any:
        return signature_of(self._program, args, self.router.captured(route))

    def _serving_of(self, route: Route, said: step | None) -> Serving | None:
        if said is None or not said.inputs:
            return None
        if route.key not in self._servings:
            self._servings[route.key] = Serving(route.named, self._step_dims, self._config.pad)
        serving = self._servings[route.key]
        serving.refresh(said.inputs)
        return serving

    def _lay_out(self, known: Observation, route: Route) -> Layout:
        config = self._config
        return lay_out(
            self._program,
            known,
            Choice(
                full=route.mode is FULL,
                demoted=self._attempts.demoted,
                unstable=self._moves.unstable,
                static_args=config.static_args,
                max_copy_bytes=config.max_copy_bytes,
                uniform_query_len=route.batch.uniform_query_len,
                apart=self.inspector.apart(route.key),
            ),
        )

    def _capture(
        self, route: Route, known: Observation, layout: Layout, args: tuple[Any, ...], serving: Serving | None
    ) -> tuple[Any, ...]:
        started = time.perf_counter()
        with contextlib.ExitStack() as session:
            try:
                before = self._device.usage()
                pool = session.enter_context(self._device.session())
                capture = SegmentedCapture(self._program, known, layout, self._device, pool, args)
                capture.bind_inputs(self._arena)
            except Exception as error:  # nothing has run yet
                self._note_failure(route, Failure.of(error))
                return self._live(args, "a capture could not begin")
            label = f"capturing {self._program.name}"
            bar = session.enter_context(Progress(label, len(self._program.steps), enabled=self._config.progress))
            session.enter_context(_frozen(serving))
            with torch.no_grad():
                outputs, failure = capture.run(bar, self._policy)
        if failure is not None:
            self._note_failure(route, failure)
            return outputs
        recorded = capture.recorded
        grown = self._device.usage().since(before)
        holding = self._room.take(route.key, grown, _dropper(self, route.key))
        if isinstance(holding, Holding):
            stats = _plan_stats(route, recorded, grown, time.perf_counter() - started)
            self._add(route, recorded, stats, holding, serving)
        else:
            _log.info("%s: the plan for %s was given up: %s", self._program.name, route.sizes, holding)
        return outputs

    def _note_failure(self, route: Route, failure: Failure) -> None:
        if failure.out_of_memory:
            self._attempts.note_no_memory(failure, self._room.out_of_memory(route.key))
        else:
            self._attempts.note_failure(failure)

    def _add(
        self, route: Route, recorded: Recorded, stats: PlanStats, holding: Holding, serving: Serving | None
    ) -> None:
        at_end = self._device.at_end(recorded.segments, recorded.outputs.lent())
        if at_end is not None:
            at_end()

        itself = weakref.ref(self)  # so that a runner that nobody calls any more goes at once, its plans with it

        def mismatch(reason: str) -> None:
            if (runner := itself()) is not None:
                runner.stats.live_calls[reason] += 1
                runner._attempts.refuse(route, reason)
                runner._drop_key(route.key)

        replay, stats.source = generate(recorded, at_end, mismatch)
        plan = Plan(route, replay, stats.source, static_addresses(recorded), recorded, stats, holding, serving)
        self._plans[route.key] = plan
        self.inspector.attach(route.key, recorded, replay)
        if self._config.annotate:
            annotate(replay, recorded, self._device.device.type == "cuda")
        bound = zip(self._program.inputs, recorded.layout.bindings, strict=True)
        self.stats.bindings = {spec.name: binding.value for spec, binding in bound}
        self.stats.add(stats)
        if self._device.device.type == "cuda" and self._config.cache:
            native.prepare(cache_root(self._config.cache_dir))

    def _distrust(self, steps: Mapping[int, str]) -> None:
        """These steps run live from now on; plans that hold them are captured again."""
        self._attempts.demoted |= steps
        for plan in list(self._plans.values()):
            if steps.keys() - plan.recorded.layout.live.keys():
                self._drop(plan)

    def _drop_key(self, key: Hashable) -> None:
        if (plan := self._plans.get(key)) is not None:
            self._drop(plan)

    def _drop(self, plan: Plan) -> None:
        if self._plans.pop(plan.route.key, None) is not None:
            for each in plan.served:
                self._served.pop(each.key, None)
            self.stats.retire(plan.stats)

    def _calls(self) -> int:
        return self.stats.replays + self.stats.live_calls.total()


@contextlib.contextmanager
def _frozen(serving: Serving | None) -> Iterator[None]:
    """No new buffers while recording."""
    if serving is None:
        yield
        return
    serving.is_recording = True
    try:
        yield
    finally:
        serving.is_recording = False


def _with_inputs(replay: Callable[[tuple[Any, ...]], Any], serving: Serving) -> Callable[[tuple[Any, ...]], Any]:
    """A replay that brings the step's inputs to where the plan reads them."""

    def with_inputs(args: tuple[Any, ...]) -> Any:
        said = current()
        if said is None:
            return Unfit.CHANGED
        serving.refresh(said.inputs)
        with serving:
            return replay(args)

    return with_inputs


def _size_reader(program: Program) -> Callable[[tuple[Any, ...]], Any]:
    """The function that takes the arguments and returns the sizes of the key: ``()``, the only one, or a tuple."""
    where = [i for i, spec in enumerate(program.inputs) if spec.kind is InputKind.SCALAR and spec.in_key]
    return operator.itemgetter(*where) if where else lambda args: ()


def _dropper(runner: GraphRunner, key: Hashable) -> Callable[[], None]:
    """How the account gives up a plan; it does not keep the runner alive."""
    reference = weakref.ref(runner)

    def drop() -> None:
        if (runner := reference()) is not None:
            runner._drop_key(key)

    return drop


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
