"""The segmented capture: one call of a program that returns true values and leaves a recording behind.

Captured steps extend the current segment. A live step ends it: the segment is replayed at once, so that the live step
reads true values, then the live step runs for real. Every effect of the call happens exactly once. Nothing runs on the
stream that records; replays and live steps run on the caller's. (A call that is made only to be recorded may do without
its live steps.)

When a recording fails, none of its kernels has run: the steps of the failed segment run live from the values that stand
in the slot table, and so does the rest of the call.

In a process group the ranks ask each other before each replay and each live step whether all is well so far. When one
of them has failed, none goes on: all run the same rest live.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from graphcap.cudagraph.agreement import Agreement, alone
from graphcap.cudagraph.checks.scales import Scales
from graphcap.cudagraph.dispatch.asked import inputs_asked_for
from graphcap.cudagraph.hardware.device import GraphDevice, Pool, Recording, UnjoinedStreamError
from graphcap.cudagraph.program import Program
from graphcap.cudagraph.recording.arena import Arena
from graphcap.cudagraph.recording.bridges import BridgeSpace
from graphcap.cudagraph.recording.in_place import InPlace
from graphcap.cudagraph.recording.layout import Layout
from graphcap.cudagraph.recording.observe import Observation
from graphcap.cudagraph.recording.recorded import Failure, Recorded, handed_out, outputs_of, run_live
from graphcap.cudagraph.recording.values import Values
from graphcap.cudagraph.replaying.handout import Policy
from graphcap.errors import RankError
from graphcap.progress import Progress


class SegmentedCapture:
    """One capturing call. Make it inside of the device's session, then :meth:`run` it once."""

    def __init__(
        self,
        program: Program,
        seen: Observation,
        layout: Layout,
        device: GraphDevice,
        pool: Pool,
        args: Sequence[Any],
        agreement: Agreement = alone,
    ) -> None:
        self.recorded = Recorded(program, seen, layout, pool)
        self._device = device
        self._agreement = agreement
        self._verdict: Failure | None = None  # what the group knows of failures
        self._values = Values(self.recorded, args, device.device)
        self._recording: Recording | None = None
        self._first = 0  # the first step of the current segment
        self._ended: list[torch.Tensor] = []  # released between two segments, for the next one
        self._asked = set[str]()  # what the present step looks for among the inputs of the ``graphcap.step``
        self._scales: Scales | None = None
        self._spared: Collection[int] = ()

    def bind_inputs(self, arena: Arena, space: BridgeSpace, in_place: InPlace) -> None:
        """See :meth:`graphcap.cudagraph.recording.values.Values.bind_inputs`."""
        self._values.bind_inputs(arena, space, in_place)

    def run(
        self, bar: Progress, policy: Policy, scales: Scales | None = None, spared: Collection[int] = ()
    ) -> tuple[tuple[Any, ...], Failure | None]:
        """Run the call, one step after the other.

        Args:
            bar: is told of each step.
            policy: how outputs leave.
            scales: weigh each segment before it is launched, if given.
            spared: live steps that do not run. They write nothing into slots; see
                :meth:`graphcap.cudagraph.recording.values.Values.blank`.

        Returns:
            The program's outputs (as far as ``spared`` lets them be), and why there is no plan if there is none.

        Raises:
            Exception: what a live step raises, as it would without any graph.
        """
        self._scales, self._spared = scales, spared
        try:
            with inputs_asked_for() as self._asked:
                failure = self._run_segments(bar)
            if failure is not None and failure is not self._verdict:
                failure = self._agree(failure)
        except BaseException:
            self._abort()
            raise
        recorded, values = self.recorded, self._values
        captured_below = len(recorded.program.steps)
        if failure is not None:
            captured_below = self._first
            if failure.out_of_memory and not recorded.segments:
                values.give_back(self._first)
            run_live(recorded.program, values.slots, self._first)
        values.return_padded()
        recorded.outputs = outputs_of(recorded, values.slots, captured_below)
        if failure is None:
            try:
                recorded.outputs = handed_out(recorded, recorded.outputs, values.slots, policy, self._device)
            except Exception as error:  # no memory for a ring: this call still has clones to return
                failure = Failure.of(error)
        try:
            return recorded.outputs.collect(values.slots), failure
        except torch.OutOfMemoryError as error:  # every effect has happened: hand out what there is, and keep no plan
            return recorded.outputs.uncopied().collect(values.slots), Failure.of(error)

    def _agree(self, failure: Failure | None) -> Failure | None:
        """Whether somebody has failed so far. Each rank asks until that is so, so that all stop at the same place."""
        if self._agreement.is_group:
            failures = self._agreement.gather(f"{self.recorded.program.name}: is all well", failure, usual=None)
            failure = Failure.of_ranks(failures)
        self._verdict = failure
        return failure

    def _run_segments(self, bar: Progress) -> Failure | None:
        for number, step in enumerate(self.recorded.program.steps):
            failure = self._live(number) if number in self.recorded.layout.live else self._record(number)
            if failure is not None:
                return failure
            bar.advance(step.name)
        return self._close(len(self.recorded.program.steps))

    def _record(self, number: int) -> Failure | None:
        segments = self.recorded.layout.segments
        if self._recording is not None and segments[number] != segments[number - 1]:
            failure = self._close(number)
            if failure is not None:
                return failure
        step = self.recorded.program.steps[number]
        try:
            with torch.inference_mode(False), torch.no_grad():
                if self._recording is None:
                    self._first = number
                    self._recording = self._device.begin(self.recorded.pool, self._ended)
                    self._ended = []
                read = [self._values.bound[slot] for slot in step.reads]
                results = self._recording.call(step.fn, read)
                self._values.recorded_step(step, read, results, self._asked)
        except Exception as error:
            self._abort()
            return Failure.of(error, (number,))
        self._release(number)
        return None

    def _live(self, number: int) -> Failure | None:
        failure = self._close(number)
        if failure is not None:
            return failure
        step, values = self.recorded.program.steps[number], self._values
        self._first = number
        if (failure := self._agree(None)) is not None:
            return failure
        self._first = number + 1
        if number in self._spared:
            values.blank(step)
        else:
            values.ran(step, step.fn(*[values.slots[slot] for slot in step.reads]))
        try:
            values.place_results(number, step, self._asked)
        except Exception as error:
            return Failure.of(error)
        self.recorded.timeline.append(number)
        self._release(number)
        return None

    def _release(self, number: int) -> None:
        self._asked.clear()
        released = self._values.release(number)
        if self._recording is None:
            self._ended += released
            return
        for each in released:
            self._recording.release(each)

    def _close(self, number: int) -> Failure | None:
        """End the current segment and run it."""
        if self._recording is None:
            self._values.drop_outlived()
            return None
        try:
            segment = self._recording.end()
            self._recording = None
            if (failure := self._agree(None)) is not None:
                return failure
            if self._scales is not None:
                self._scales.weigh(self.recorded, range(self._first, number), segment.replay)
            segment.replay()
        except RankError:
            raise
        except Exception as error:
            self._abort()
            steps = tuple(range(self._first, number))
            if isinstance(error, UnjoinedStreamError):
                steps = tuple(filter(self._leaves_stream_unjoined, steps)) or steps
            return Failure.of(error, steps)
        self.recorded.timeline.append(~len(self.recorded.segments))
        self.recorded.segments.append(segment)
        self._values.segment_ran(self._first, number)
        return None

    def _leaves_stream_unjoined(self, number: int) -> bool:
        """Whether a step cannot be ended when it is recorded alone (it never runs): the end of a segment names none.

        The pool of a recording that could not be ended takes no other one, so each step gets the one now in use.
        """
        step = self.recorded.program.steps[number]
        try:
            with self._device.session() as pool, torch.inference_mode(False), torch.no_grad():
                self._recording = self._device.begin(pool, [])
                self._recording.call(step.fn, [self._values.bound[slot] for slot in step.reads])
                self._recording.end()
        except Exception as error:
            self._abort()
            return isinstance(error, UnjoinedStreamError)
        self._recording = None
        return False

    def _abort(self) -> None:
        recording, self._recording = self._recording, None
        if recording is not None:
            recording.abort()
