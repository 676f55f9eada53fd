"""What happens when a region is called: replay, capture, or run live, and what is remembered for the next call."""

from __future__ import annotations

import contextlib
import logging
import operator
import time
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch

from graphcap import native
from graphcap.cache_root import cache_root
from graphcap.config import Config, CUDAGraphMode
from graphcap.cudagraph.arena import Arena
from graphcap.cudagraph.bindings import Choice
from graphcap.cudagraph.budget import Holding, Room, Usage
from graphcap.cudagraph.capture import SegmentedCapture
from graphcap.cudagraph.device import GraphDevice
from graphcap.cudagraph.layout import Layout, lay_out
from graphcap.cudagraph.moves import MoveRecord
from graphcap.cudagraph.observe import Observation, observe, signature_of
from graphcap.cudagraph.plan import Plan, Unfit, static_addresses
from graphcap.cudagraph.program import Capture, InputKind, Program
from graphcap.cudagraph.recorded import Failure, Recorded
from graphcap.cudagraph.replay import generate
from graphcap.cudagraph.stats import PlanStats, RunnerStats
from graphcap.progress import Progress

_log = logging.getLogger("graphcap.cudagraph")

_MAX_FAILURES = 2  #: failed captures after which a region runs without new graphs
_MAX_REPLACED = 2  #: how often a plan gives way to one for another layout of the inputs under the same key
_MAX_KEYS = 65536  #: sightings remembered


class GraphRunner:
    """Calls a program, through a graph where there is one.

    ``runner(*args)`` takes one value per input of the program and returns the tuple of its outputs, always those of
    ``program.run(*args)``. Safe to call from several threads and streams.

    Attributes:
        stats: counters and the list of plans.
    """

    def __init__(self, program: Program, device: GraphDevice, config: Config) -> None:
        self.stats = RunnerStats()
        self._program = program
        self._device = device
        self._config = config
        self._full = _captures_full(program, config.cudagraph_mode)
        self._key = _key_reader(program)
        self._plans: dict[Any, Plan] = {}
        self._arena = Arena(device)
        self._sightings: dict[Any, int] = {}
        self._observations: dict[Any, Observation] = {}
        self._replaced: dict[Any, int] = {}
        self._refused: dict[Any, str] = {}
        self._failed = ""
        self._num_failures = 0
        self._demoted: dict[int, str] = {}
        self._moves = MoveRecord(program, config)
        self._room = Room(device, config.max_graph_bytes)
        self._tick = device.account.tick
        self._warned_of_memory = False

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        key = self._key(args)
        plan = self._plans.get(key)
        if plan is None:
            return self._without_plan(key, args)
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
                    result = plan.replay(args)
                finally:
                    device.busy = False
        if result.__class__ is tuple:
            plan.stats.replays += 1
            plan.holding.last_use = self._tick()
            plan.num_changed = 0
            return result
        return self._unfit(key, plan, result, args)

    def release(self) -> None:
        """Drop every plan; the pool goes with the last plan on the device. Later calls capture again."""
        with self._device.lock:
            if self._plans and self._device.enter():
                self._device.wait()
            for key in list(self._plans):
                self._drop(key)
            self._room.clear()

    def _why_not_here(self) -> str:
        return self._device.unusable or "inside another capture or replay"

    def _live(self, args: tuple[Any, ...], reason: str) -> tuple[Any, ...]:
        self.stats.live_calls[reason] += 1
        return self._program.run(*args)

    def _unfit(self, key: Any, plan: Plan, why: Unfit | None, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """A plan exists and could not serve the call. Nothing has run yet."""
        if why is None:
            return self._live(args, self._why_not_here())
        if why is Unfit.MOVED:
            self._moves.note(plan.addresses, args, self._calls(), self.stats)
            self._drop(key)
            self.stats.recaptures += 1
            return self._capture_when_known(key, args)
        plan.num_changed += 1
        if plan.num_changed >= self._due(key) and self._replaced.get(key, 0) < _MAX_REPLACED:
            self._replaced[key] = self._replaced.get(key, 0) + 1
            self._drop(key)
        return self._live(args, why.value)

    def _without_plan(self, key: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        reason = self._failed or self._refused.get(key) or self._oversize(key) or self._room.closed(key)
        if reason:
            return self._live(args, reason)
        if len(self._sightings) >= _MAX_KEYS:
            self._sightings.clear()
        seen = self._sightings[key] = self._sightings.get(key, 0) + 1
        if seen < self._due(key) - 1:
            return self._live(args, "warm-up")
        if len(self._plans) >= self._config.max_plans:
            return self._live(args, f"max_plans={self._config.max_plans} reached")
        return self._capture_when_known(key, args)

    def _oversize(self, key: Any) -> str:
        limit = self._config.max_capture_size
        sizes = key if isinstance(key, tuple) else (key,)
        return f"above max_capture_size={limit}" if limit is not None and any(each > limit for each in sizes) else ""

    def _due(self, key: Any) -> int:
        """The sighting at which a key is captured."""
        return 2 if key in (self._config.capture_sizes or ()) else self._config.capture_after

    def _capture_when_known(self, key: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Capture, if an earlier call has shown how values share memory; otherwise let this call show it."""
        known = self._observations.get(key)
        if known is None or known.signature != signature_of(self._program, args):
            self.stats.live_calls["warm-up"] += 1
            self._observations[key], outputs = observe(self._program, args, self._device.device)
            return outputs
        device = self._device
        with device.lock:
            if device.busy or not device.enter():
                return self._live(args, self._why_not_here())
            if key in self._plans:  # another thread was faster
                return self(*args)
            layout = self._lay_out(known)
            if len(layout.live) == len(self._program.steps):
                self._refused[key] = f"nothing to capture: {next(iter(layout.live.values()), 'no steps')}"
                return self._live(args, self._refused[key])
            if reason := self._room.make(key):
                return self._live(args, reason)
            device.busy = True
            try:
                return self._capture(key, known, layout, args)
            finally:
                device.busy = False

    def _lay_out(self, known: Observation) -> Layout:
        config = self._config
        choice = Choice(self._full, self._demoted, self._moves.unstable, config.static_args, config.max_copy_bytes)
        return lay_out(self._program, known, choice)

    def _capture(self, key: Any, known: Observation, layout: Layout, args: tuple[Any, ...]) -> tuple[Any, ...]:
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
            except Exception as error:  # nothing has run yet
                self._note_failure(key, Failure.of(error))
                return self._live(args, "a capture could not begin")
            label = f"capturing {self._program.name}"
            bar = session.enter_context(Progress(label, len(self._program.steps), enabled=self._config.progress))
            with torch.no_grad():
                outputs, failure = capture.run(bar)
        if failure is None:
            recorded = capture.recorded
            grown = self._device.usage().since(before)
            holding = self._room.take(key, grown, _dropper(self, key))
            if isinstance(holding, Holding):
                self._add(key, recorded, _plan_stats(key, recorded, grown, time.perf_counter() - started), holding)
            else:
                _log.info("%s: the plan for %s was given up: %s", self._program.name, key, holding)
        else:
            self._note_failure(key, failure)
        return outputs

    def _add(self, key: Any, recorded: Recorded, stats: PlanStats, holding: Holding) -> None:
        at_end = self._device.at_end(recorded.segments)
        if at_end is not None:
            at_end()

        itself = weakref.ref(self)  # so that a runner that nobody calls any more goes at once, its plans with it

        def mismatch(reason: str) -> None:
            if (runner := itself()) is not None:
                runner.stats.live_calls[reason] += 1
                runner._refused[key] = reason
                runner._drop(key)

        replay, stats.source = generate(recorded, at_end, mismatch)
        self._plans[key] = Plan(replay, stats.source, static_addresses(recorded), recorded, stats, holding)
        bound = zip(self._program.inputs, recorded.layout.bindings, strict=True)
        self.stats.bindings = {spec.name: binding.value for spec, binding in bound}
        self.stats.add(stats)
        if self._device.device.type == "cuda" and self._config.cache:
            native.prepare(cache_root(self._config.cache_dir))

    def _drop(self, key: Any) -> None:
        plan = self._plans.pop(key, None)
        if plan is not None:
            self.stats.retire(plan.stats)

    def _note_failure(self, key: Any, failure: Failure) -> None:
        if failure.out_of_memory:
            reason = self._room.out_of_memory(key)
            self.stats.failures.append(failure.reason)
            if not self._warned_of_memory:
                self._warned_of_memory = True
                name = self._program.name
                warnings.warn(f"graphcap: {name} runs without graphs where {reason}: {failure.reason}", stacklevel=2)
            return
        names = ", ".join(self._program.steps[number].name for number in failure.steps)
        reason = f"{names}: {failure.reason}" if names else failure.reason
        self.stats.failures.append(reason)
        self._demoted |= dict.fromkeys(failure.steps, f"capture failed: {failure.reason}")
        self._num_failures += 1
        if self._num_failures < _MAX_FAILURES:
            _log.info("%s: capture failed, these steps run live from now on: %s", self._program.name, reason)
            return
        self._failed = f"capture failed: {reason}"
        warnings.warn(
            f"graphcap: {self._program.name} runs compiled, without further CUDA graphs: captures failed "
            f"{self._num_failures} times, last in {reason}",
            stacklevel=2,
        )

    def _calls(self) -> int:
        return self.stats.replays + self.stats.live_calls.total()


def _captures_full(program: Program, mode: CUDAGraphMode) -> bool:
    if mode is CUDAGraphMode.AUTO:
        return all(step.capture is not Capture.NEVER for step in program.steps)
    return mode is CUDAGraphMode.FULL


def _key_reader(program: Program) -> Callable[[tuple[Any, ...]], Any]:
    """The function that takes the arguments and returns the key: ``()``, the only size, or a tuple of sizes."""
    where = [i for i, spec in enumerate(program.inputs) if spec.kind is InputKind.SCALAR and spec.in_key]
    return operator.itemgetter(*where) if where else lambda args: ()


def _dropper(runner: GraphRunner, key: Any) -> Callable[[], None]:
    """How the account gives up a plan; it does not keep the runner alive."""
    reference = weakref.ref(runner)

    def drop() -> None:
        if (runner := reference()) is not None:
            runner._drop(key)

    return drop


def _plan_stats(key: Any, recorded: Recorded, grown: Usage, seconds: float) -> PlanStats:
    steps, live = recorded.program.steps, recorded.layout.live
    return PlanStats(
        key=key if isinstance(key, tuple) else (key,),
        mode="FULL" if recorded.layout.full else "PIECEWISE",
        num_segments=len(recorded.segments),
        captured=[step.name for number, step in enumerate(steps) if number not in live],
        live={step.name: live[number] for number, step in enumerate(steps) if number in live},
        bytes=grown.exclusive + grown.shared,
        seconds=seconds,
        exclusive_bytes=grown.exclusive,
        shared_bytes=grown.shared,
    )
