"""The capture of a plan: a call is recorded while it is served, and from then on the plan can be replayed.

The call returns what a live run returns, and its effects happen once, whatever becomes of the capture; but for a call
that is made only to be recorded, see ``_spared``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch

from graphcap.cudagraph.checks.verify import Checks, Inspector
from graphcap.cudagraph.checks.worth import Worth
from graphcap.cudagraph.dispatch.metadata import Serving
from graphcap.cudagraph.dispatch.phase import Phase, current_purpose
from graphcap.cudagraph.dispatch.revision import revise
from graphcap.cudagraph.dispatch.route import Route
from graphcap.cudagraph.dispatch.routes import FULL
from graphcap.cudagraph.hardware.account import Usage
from graphcap.cudagraph.hardware.needs import Needs
from graphcap.cudagraph.hardware.room import Room
from graphcap.cudagraph.made import ELSEWHERE, WARM_UP, Made
from graphcap.cudagraph.parts import Parts
from graphcap.cudagraph.plan_writer import PlanWriter
from graphcap.cudagraph.recording.arena import Arena
from graphcap.cudagraph.recording.bindings import Choice
from graphcap.cudagraph.recording.bridges import BridgeSpace
from graphcap.cudagraph.recording.capture import SegmentedCapture
from graphcap.cudagraph.recording.in_place import InPlace
from graphcap.cudagraph.recording.layout import Layout, Layouts
from graphcap.cudagraph.recording.observe import Observation
from graphcap.cudagraph.recording.recorded import Failure
from graphcap.cudagraph.replaying.handout import Policy
from graphcap.environment import check_outputs_wanted
from graphcap.progress import Progress

_log = logging.getLogger("graphcap.cudagraph")


class PlanCapture:
    """Captures the plans of one runner.

    Attributes:
        room: what the plans may take of the device.
        inspector: looks into the replays of every plan that is captured from now on.
    """

    def __init__(self, parts: Parts) -> None:
        self._program, self._device, self._config = parts.program, parts.device, parts.config
        self._padding, self._table, self._attempts = parts.padding, parts.table, parts.attempts
        self._moves, self._stats, self._router = parts.moves, parts.stats, parts.router
        self._agreement, self._question = parts.agreement, parts.question
        config = parts.config
        self._policy = Policy.of(config, config.debug_dir is not None or check_outputs_wanted(os.environ))
        self._layouts = Layouts(parts.program)
        self._bridges = BridgeSpace(parts.device)
        self._arena = Arena(self._device)
        self._in_place = InPlace()
        self._writer = PlanWriter(parts, self._arena)
        self.room = Room(self._device, config.max_graph_bytes, self._agreement)
        self._needs = Needs()
        self._worth = Worth(self._device)
        # A comparison runs steps once more, and whether there is one depends on values: ranks would lose step.
        why_not = "replays are not compared in a process group" if self._agreement.is_group else ""
        self.inspector: Inspector = Checks(
            self._program,
            config.verify,
            parts.stats,
            self.distrust,
            self._table.drop,
            self._device.spare_bytes,
            why_not,
        )

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

    def serve(
        self, route: Route, known: Observation, args: tuple[Any, ...], serving: Serving | None, *, is_warm: bool
    ) -> Made:
        """Serve a call and record it, if that is possible now.

        Args:
            route: what the plan is going to be good for.
            known: what an earlier call of the same form has shown.
            args: of the call, at the sizes of the route.
            serving: the step inputs that ops find; entered by the caller.
            is_warm: whether a call of this route has run live. A step that fails in another one may lack just that.
        """
        device = self._device
        with device.lock:
            reason = self._agreement.reason(self._question("may it begin", route), self._why_not_now(route))
            if reason:
                return Made(self._program.run(*args), reason)
            layout = self._same_on_all_ranks(self._lay_out(known, route, self._worth.live(route)), known, route)
            if len(layout.live) == len(self._program.steps):
                reason = f"nothing to capture: {next(iter(layout.live.values()), 'no steps')}"
                self._attempts.refuse(route, reason)
                return Made(self._program.run(*args), reason)
            if route.key in self._table.plans:  # it may be padded in less: its memory is for the one that replaces it
                device.wait()
                self._table.drop(route.key)
            used = self.room.make(route.key, self._needs.guess(*self._router.weight(route)))
            if isinstance(used, str):
                return Made(self._program.run(*args), used)
            device.busy = True
            try:
                made = self._capture(route, known, layout, args, serving, used, is_warm)
            finally:
                device.busy = False
            return made or Made(self._program.run(*args), "a capture could not begin")

    def _why_not_now(self, route: Route) -> str:
        if self._device.busy or not self._device.enter():
            return self._device.unusable or ELSEWHERE
        plan = self._table.plans.get(route.key)
        if plan is not None and plan.route.covers(route):
            # Of a group: at its own size on every rank, but that was not known before.
            return "padding is not proven" if self._agreement.is_group else "another thread was faster"
        return ""

    def _same_on_all_ranks(self, layout: Layout, known: Observation, route: Route) -> Layout:
        """What runs live on one rank runs live on all of them."""
        everywhere = self._agreement.gather(self._question("what runs live", route), dict(layout.live))
        others = {
            number: f"runs live on rank {rank}: {reason}"
            for rank, live in enumerate(everywhere)
            for number, reason in live.items()
            if number not in layout.live
        }
        if not others:
            return layout
        self._attempts.demoted |= others
        return self._lay_out(known, route, self._worth.live(route))

    def _lay_out(self, known: Observation, route: Route, by_choice: Mapping[int, str]) -> Layout:
        """``by_choice``: steps that run live because a graph would not pay."""
        return self._layouts.of(
            known,
            Choice(
                full=route.mode is FULL,
                demoted={**by_choice, **self._attempts.demoted},
                unstable=frozenset(self._moves.unstable),
                static_args=self._config.static_args,
                max_copy_bytes=self._config.max_copy_bytes,
                uniform_query_len=route.batch.uniform_query_len,
                padded=self._padding.inputs_of(route.rung),
                apart=frozenset(self.inspector.apart(route.key)),
            ),
        )

    def _capture(
        self,
        route: Route,
        known: Observation,
        layout: Layout,
        args: tuple[Any, ...],
        serving: Serving | None,
        before: Usage,
        is_warm: bool,
    ) -> Made | None:
        """Record the call; ``None`` when nothing has run. ``before`` is what was in use."""
        started = time.perf_counter()
        with contextlib.ExitStack() as session:
            try:
                # Nobody but the capture may hold the pool: it gives it back when the device turns out to be full.
                entered = self._device.session()
                capture = SegmentedCapture(
                    self._program, known, layout, self._device, session.enter_context(entered), args, self._agreement
                )
                capture.bind_inputs(self._arena, self._bridges, self._in_place)
                failure = None
            except Exception as error:
                failure = Failure.of(error)
            if (failure := self._first_failure("is it ready", route, failure)) is not None:
                self._note_failure(route, failure)
                return None
            bar = session.enter_context(self._bar())
            session.enter_context(_frozen(serving))
            with torch.no_grad():
                scales = self._worth.scales(route, layout)
                spared = self._spared(known, layout) if is_warm and scales is None else ()
                outputs, failure = capture.run(bar, self._policy, scales, spared)
        failure = self._first_failure("was it captured", route, failure)
        if failure is not None and failure.misjudged:
            _log.info("%s: %s is unlike other sizes: %s", self._program.name, route.sizes, failure.reason)
            return Made(outputs, WARM_UP, misjudged=True)
        if failure is not None and not is_warm and not failure.out_of_memory:
            _log.info("%s: %s needs a warm-up: %s", self._program.name, route.sizes, failure.reason)
            return Made(outputs, WARM_UP, was_cold=True)
        if failure is not None:
            self._note_failure(route, failure)
            return Made(outputs)
        if scales is not None and self._worth.judge(
            route, layout, scales.weighed, lambda live: self._lay_out(known, route, live)
        ):
            self._device.wait()  # the next call captures again, with these live
            revise()
            return Made(outputs)
        after = self._device.usage()
        grown = after.since(before)
        self._needs.note(*self._router.weight(route), grown.exclusive)
        holding = self.room.take(route.key, grown, after.shared, self._table.dropper(route.key))
        if isinstance(holding, str):
            _log.info("%s: the plan for %s was given up: %s", self._program.name, route.sizes, holding)
            return Made(outputs)
        seconds = time.perf_counter() - started
        self._table.add(self._writer.write(route, capture.recorded, holding, grown, seconds, serving, self.inspector))
        return Made(outputs)

    def _spared(self, known: Observation, layout: Layout) -> Collection[int]:
        """The live steps that need not run, in a call that nobody reads, of a size that has run live before: those that
        only write, if all do. (A result that is not there has no size to make room for, and one that is made from
        others which are not may be no valid index.) The first size of a family runs whole, and ranks run the same."""
        steps = self._program.steps
        if not current_purpose().is_unread or not known.is_of_another_size or self._agreement.is_group:
            return ()
        return () if any(steps[number].writes for number in layout.live) else layout.live.keys()

    def _bar(self) -> Progress:
        """Shows the steps, unless somebody shows how many captures are done."""
        wanted = self._config.progress and current_purpose().phase is not Phase.RECORD
        return Progress(f"capturing {self._program.name}", len(self._program.steps), enabled=wanted)

    def _first_failure(self, what: str, route: Route, failure: Failure | None) -> Failure | None:
        """What went wrong on any rank."""
        if not self._agreement.is_group:
            return failure
        return Failure.of_ranks(self._agreement.gather(self._question(what, route), failure, usual=None))

    def _note_failure(self, route: Route, failure: Failure) -> None:
        if failure.out_of_memory:
            self._attempts.note_no_memory(failure, self.room.out_of_memory(route.key))
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
