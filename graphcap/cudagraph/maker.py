"""The calls that lead to a plan: the warm-up, the proof that padding changes nothing, and the capture itself.

Each of them serves its call: what it returns is what a live run returns, and its effects happen once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from graphcap import native
from graphcap.cache_root import cache_root
from graphcap.config import Config
from graphcap.cudagraph.annotate import annotate
from graphcap.cudagraph.arena import Arena
from graphcap.cudagraph.attempts import Attempts
from graphcap.cudagraph.bindings import Choice
from graphcap.cudagraph.budget import Room, Usage
from graphcap.cudagraph.capture import SegmentedCapture
from graphcap.cudagraph.device import GraphDevice
from graphcap.cudagraph.fitted import Fitter
from graphcap.cudagraph.handout import Policy
from graphcap.cudagraph.layout import Layout, lay_out
from graphcap.cudagraph.metadata import Serving, dims_of_step
from graphcap.cudagraph.moves import MoveRecord
from graphcap.cudagraph.observe import Observation, observe, signature_of
from graphcap.cudagraph.padding import Padding
from graphcap.cudagraph.plan import Plan, static_addresses
from graphcap.cudagraph.plan_table import PlanTable
from graphcap.cudagraph.program import InputKind, Program
from graphcap.cudagraph.proof import prove
from graphcap.cudagraph.recorded import Failure, Recorded
from graphcap.cudagraph.replay import generate
from graphcap.cudagraph.routes import FULL, Route, Router
from graphcap.cudagraph.stats import PlanStats, RunnerStats
from graphcap.cudagraph.step import Asked, current, step
from graphcap.cudagraph.verify import Checks, Inspector
from graphcap.environment import check_outputs_wanted
from graphcap.progress import Progress

_log = logging.getLogger("graphcap.cudagraph")

_WARM_UP = "warm-up"


ELSEWHERE = "inside another capture or replay"  #: why a plan cannot run, where the device is in use further up


class Made(NamedTuple):
    """A call on the way to a plan.

    Attributes:
        outputs: what it returns.
        reason: why it ran without a graph; ``""`` for the one that was captured.
    """

    outputs: tuple[Any, ...]
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Parts:
    """What a runner consists of."""

    program: Program
    device: GraphDevice
    config: Config
    padding: Padding
    router: Router
    table: PlanTable
    attempts: Attempts
    moves: MoveRecord


class PlanMaker:
    """Makes the plans of one runner.

    Attributes:
        inspector: looks into the replays of every plan that is made from now on.
    """

    def __init__(self, parts: Parts, stats: RunnerStats) -> None:
        self._program, self._device, self._config = parts.program, parts.device, parts.config
        self._padding, self._router, self._table = parts.padding, parts.router, parts.table
        self._attempts, self._moves, self._stats = parts.attempts, parts.moves, stats
        config = parts.config
        self._policy = Policy.of(config, config.debug_dir is not None or check_outputs_wanted(os.environ))
        self._room = Room(self._device, config.max_graph_bytes)
        self._arena = Arena(self._device)
        self._observations: dict[Hashable, Observation] = {}
        self._servings: dict[Hashable, Serving] = {}
        self._asked: dict[Hashable, Asked] = {}
        self._step_dims = dims_of_step(config.dynamic_arg_dims)
        self._proven: dict[Hashable, list[frozenset[tuple[str, Any]]]] = {}  # per proof what was 0 or 1
        self.inspector: Inspector = Checks(self._program, config.verify, stats, self.distrust, self._table.drop)

    @contextlib.contextmanager
    def inspected(self, inspector: Inspector) -> Iterator[None]:
        """Have ``inspector`` look into the plans that are made within this block."""
        before, self.inspector = self.inspector, inspector
        try:
            yield
        finally:
            self.inspector = before

    def distrust(self, steps: Mapping[int, str]) -> None:
        """These steps run live from now on; plans that hold them are captured again."""
        self._attempts.demoted |= steps
        self._table.drop_if(lambda plan: bool(steps.keys() - plan.recorded.layout.live.keys()))

    def clear(self) -> None:
        """Give up the buffers of step inputs, and what is known about the room on the device."""
        for key in self._servings:  # a capture finds no buffers: another warm-up has to make them
            self._forget(key)
        self._servings.clear()
        self._room.clear()

    def forget(self, route: Route) -> None:
        """Let the next call be a warm-up again."""
        self._forget(route.key)

    def _forget(self, key: Hashable) -> None:
        known = self._observations.pop(key, None)
        if known is not None:
            self._observations[None] = known  # a proof asks for any call that was seen

    def no_room(self, route: Route) -> str:
        """Why the device has no room for a plan, ``""`` where it may."""
        return self._room.closed(route.key)

    def may_serve(self, plan: Plan, args: tuple[Any, ...], said: step | None) -> bool:
        """Whether a plan serves a call of this size: one that is padded only after the proof."""
        if not plan.route.rung or not self._is_smaller(plan.route, args):
            return True
        return self._is_proven(plan.route, args, said) and not self._padding.why_not_to(plan.route.rung, args)

    def serve(self, route: Route, args: tuple[Any, ...], said: step | None) -> Made:
        """Serve a call that leads to the plan of a route, or has just lost it."""
        if (asked := self._asked.pop(route.key, None)) is not None and not asked.is_alike(said):
            self._servings.pop(route.key, None)  # what the warm-up showed does not hold for such a step
            self.forget(route)
        serving = self._serving_of(route, said)
        if not route.rung:
            return self._at_size(route, args, args, serving)
        if reason := self._padding.why_not_to(route.rung, args):
            return Made(self._program.run(*args), reason)
        if self._is_smaller(route, args) and not self._is_proven(route, args, said):
            return Made(self._prove(route, args, said, serving), _WARM_UP)
        return self._at_size(route, args, tuple(self._padding.pad(args, route.rung)), serving)

    def _family(self, route: Route) -> Hashable:
        batch = route.batch  # the number of requests goes with the rung, what is proven does not
        named = zip(self._router.symbols, route.sizes, strict=True)
        exact = tuple(size for symbol, size in named if symbol not in route.rung)
        return batch.uniform_query_len, batch.tags, frozenset(route.rung), exact

    def _is_proven(self, route: Route, args: tuple[Any, ...], said: step | None) -> bool:
        """Whether a proof holds for a call. One in which something was 0 or 1 is good for such calls alone: it hides
        mixing (padded rows are rightly divided among one request; nothing times a mean is nothing)."""
        special = self._special_values(args, said)
        return any(proof <= special for proof in self._proven.get(self._family(route), ()))

    def _special_values(self, args: tuple[Any, ...], said: step | None) -> frozenset[tuple[str, Any]]:
        inputs = zip(self._program.inputs, args, strict=True)
        values = [(spec.name, value) for spec, value in inputs if spec.kind is InputKind.SCALAR and spec.in_key]
        if said is not None and said.key is not None:
            values.append(("requests of the step", said.key.num_reqs))
        return frozenset((name, value) for name, value in values if value is not None and value in (0, 1))

    def _is_smaller(self, route: Route, args: tuple[Any, ...]) -> bool:
        real = self._padding.sizes(args)
        return real is None or any(real[symbol] != size for symbol, size in route.rung.items())

    def _prove(
        self, route: Route, args: tuple[Any, ...], said: step | None, serving: Serving | None
    ) -> tuple[Any, ...]:
        """The first call that would be padded runs at its own size, and shows whether it may be."""
        captured = self._router.captured(route)
        seen = next(iter(self._observations.values()), None)
        if seen is None:
            self._observations[None], outputs = observe(self._program, args, self._device.device, captured)
            return outputs
        verdict = prove(
            self._program, args, self._padding, route.rung, seen, self._device.device, self._device.spare_bytes(),
            captured, lambda: serving or contextlib.nullcontext(),
        )  # fmt: skip
        if verdict.reason:
            self._padding.refuse(route.rung, verdict.reason)
            _log.warning("%s is not padded: %s", self._program.name, verdict.reason)
        else:
            self._proven.setdefault(self._family(route), []).append(self._special_values(args, said))
            if verdict.seen is not None:
                self._observations.setdefault(route.key, verdict.seen)
                self._asked[route.key] = Asked.of(said)
        return verdict.outputs

    def _at_size(self, route: Route, args: tuple[Any, ...], padded: tuple[Any, ...], serving: Serving | None) -> Made:
        """Serve a call at the sizes of a route: capture if an earlier call has shown how values share memory;
        otherwise let this one show it."""
        known = self._observations.get(route.key)
        captured = self._router.captured(route)
        with serving or contextlib.nullcontext():
            if known is None or known.signature != signature_of(self._program, padded, captured):
                known, outputs = observe(self._program, padded, self._device.device, captured)
                self._observations[route.key] = known
                made = Made(outputs, _WARM_UP)
                self._asked[route.key] = Asked.of(current())
            else:
                made = self._capture_if_possible(route, known, padded, serving)
        if route.rung:
            return made._replace(outputs=self._padding.hand_back(args, padded, made.outputs, known))
        return made

    def _capture_if_possible(
        self, route: Route, known: Observation, args: tuple[Any, ...], serving: Serving | None
    ) -> Made:
        device = self._device
        with device.lock:
            if device.busy or not device.enter():
                return Made(self._program.run(*args), device.unusable or ELSEWHERE)
            if route.key in self._table.plans:
                return Made(self._program.run(*args), "another thread was faster")
            layout = self._lay_out(known, route)
            if len(layout.live) == len(self._program.steps):
                reason = f"nothing to capture: {next(iter(layout.live.values()), 'no steps')}"
                self._attempts.refuse(route, reason)
                return Made(self._program.run(*args), reason)
            if reason := self._room.make(route.key):
                return Made(self._program.run(*args), reason)
            device.busy = True
            try:
                outputs = self._capture(route, known, layout, args, serving)
            finally:
                device.busy = False
            return Made(self._program.run(*args), "a capture could not begin") if outputs is None else Made(outputs)

    def _serving_of(self, route: Route, said: step | None) -> Serving | None:
        if said is None or not said.inputs:
            return None
        if route.key not in self._servings:
            self._servings[route.key] = Serving(route.named, self._step_dims, self._config.pad)
        serving = self._servings[route.key]
        serving.refresh(said.inputs)
        return serving

    def _lay_out(self, known: Observation, route: Route) -> Layout:
        return lay_out(
            self._program,
            known,
            Choice(
                full=route.mode is FULL,
                demoted=self._attempts.demoted,
                unstable=self._moves.unstable,
                static_args=self._config.static_args,
                max_copy_bytes=self._config.max_copy_bytes,
                uniform_query_len=route.batch.uniform_query_len,
                padded=self._padding.inputs_of(route.rung),
                apart=self.inspector.apart(route.key),
            ),
        )

    def _capture(
        self, route: Route, known: Observation, layout: Layout, args: tuple[Any, ...], serving: Serving | None
    ) -> tuple[Any, ...] | None:
        """Record the call; its outputs, or ``None`` when nothing has run."""
        started = time.perf_counter()
        with contextlib.ExitStack() as session:
            try:
                before = self._device.usage()
                # Nobody but the capture may hold the pool: it gives it back when the device turns out to be full.
                entered = self._device.session()
                capture = SegmentedCapture(
                    self._program, known, layout, self._device, session.enter_context(entered), args
                )
                capture.bind_inputs(self._arena)
            except Exception as error:
                self._note_failure(route, Failure.of(error))
                return None
            label = f"capturing {self._program.name}"
            bar = session.enter_context(Progress(label, len(self._program.steps), enabled=self._config.progress))
            session.enter_context(_frozen(serving))
            with torch.no_grad():
                outputs, failure = capture.run(bar, self._policy)
        if failure is not None:
            self._note_failure(route, failure)
            return outputs
        grown = self._device.usage().since(before)
        holding = self._room.take(route.key, grown, _dropper(self._table, route.key))
        if isinstance(holding, str):
            _log.info("%s: the plan for %s was given up: %s", self._program.name, route.sizes, holding)
            return outputs
        recorded = capture.recorded
        stats = _plan_stats(route, recorded, grown, time.perf_counter() - started)
        replay, fitter = self._replay(route, recorded, stats)
        addresses = static_addresses(recorded)
        plan = Plan(route, replay, stats.source, addresses, recorded, stats, holding, serving, fitter=fitter)
        if _may_read_step(recorded):
            plan.asked = Asked.of(current())
        self._table.add(plan)
        return outputs

    def _replay(
        self, route: Route, recorded: Recorded, stats: PlanStats
    ) -> tuple[Callable[[tuple[Any, ...]], Any], Fitter | None]:
        """Write the replay of what was recorded."""
        at_end = self._device.at_end(recorded.segments, recorded.outputs.lent())
        if at_end is not None:
            at_end()
        itself = weakref.ref(self)  # so that a runner that nobody calls any more goes at once, its plans with it

        def mismatch(reason: str) -> None:
            if (maker := itself()) is not None:
                maker._give_up(route, reason)

        fitter = Fitter(self._padding, route.rung, recorded, self._arena) if route.rung else None
        replay, stats.source = generate(recorded, at_end, mismatch, self._arena if self._padding else None, fitter)
        self.inspector.attach(route.key, recorded, replay)
        if self._config.annotate:
            annotate(replay, recorded, self._device.device.type == "cuda")
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

    def _note_failure(self, route: Route, failure: Failure) -> None:
        if failure.out_of_memory:
            self._attempts.note_no_memory(failure, self._room.out_of_memory(route.key))
        else:
            self._attempts.note_failure(failure)


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


def _dropper(table: PlanTable, key: Hashable) -> Callable[[], None]:
    """How the account gives up a plan; it does not keep the table alive."""
    reference = weakref.ref(table)

    def drop() -> None:
        if (table := reference()) is not None:
            table.drop(key)

    return drop


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
