"""The segmented capture: one call of a program that returns true values and leaves a recording behind.

Captured steps extend the current segment. A live step ends it: the segment is replayed at once, so that the live step
reads true values, then the live step runs for real. Every effect of the call happens exactly once. Nothing runs on the
stream that records; replays and live steps run on the caller's.

When a recording fails, none of its kernels has run: the steps of the failed segment run live from the values that stand
in the slot table, and so does the rest of the call.

In a process group the ranks ask each other before each replay and each live step whether all is well so far. When one
of them has failed, none goes on: all run the same rest live.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphcap.cudagraph.agreement import Agreement, alone
from graphcap.cudagraph.checks.scales import Scales
from graphcap.cudagraph.hardware.device import GraphDevice, Pool, Recording, UnjoinedStreamError
from graphcap.cudagraph.private import storage_address, weak_view
from graphcap.cudagraph.program import Program
from graphcap.cudagraph.recording.arena import Arena, copy_into
from graphcap.cudagraph.recording.bindings import Binding
from graphcap.cudagraph.recording.bridges import Bridges, BridgeSpace
from graphcap.cudagraph.recording.layout import Layout, segment_of
from graphcap.cudagraph.recording.observe import Observation
from graphcap.cudagraph.recording.recorded import (
    Failure,
    Recorded,
    captured_slots,
    handed_out,
    inputs_written_back,
    outputs_of,
    padded_inputs_written,
    run_live,
)
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
        self._slots: list[Any] = [*args, *[None] * (len(seen.roots) - len(args))]  # what live steps read
        self._bound: list[Any] = [*args, *[None] * (len(seen.roots) - len(args))]  # what captured steps read
        self._padded = {index: args[index] for index in layout.inputs_bound(Binding.PADDED)}
        self._recording: Recording | None = None
        self._first = 0  # the first step of the current segment
        self._ended: list[torch.Tensor] = []  # released between two segments, for the next one
        self._outlived: list[int] = []  # live results to drop when the segment is closed
        self._addresses: dict[int, set[int]] = {}  # where the storage of each root may be
        self._of_inputs: set[int] = set()  # where the storages of inputs and of their stand-ins are
        self._captured = captured_slots(program, layout, len(program.steps))
        self._segments = segment_of(program, layout)
        self._crossing = _crossing_slots(program, self._segments)
        self._last_read = {slot: number for number, slots in enumerate(layout.releases) for slot in slots}
        self._scales: Scales | None = None

    def bind_inputs(self, arena: Arena, space: BridgeSpace) -> None:
        """Give every input that captured steps read its place, and copy in what is copied. ``space`` is for the results
        of live steps later on."""
        self._bridges = Bridges(space)
        layout, memory = self.recorded.layout, self.recorded.memory
        copied = layout.inputs_bound(Binding.COPIED, Binding.COPIED_BACK, Binding.PADDED)
        buffers, block = arena.buffers([self._slots[index] for index in copied])
        self.recorded.blocks.append(block)
        stand_ins = dict(zip(copied, buffers, strict=True))
        stand_ins |= {index: weak_view(self._slots[index]) for index in layout.inputs_bound(Binding.STATIC)}
        for index, root in enumerate(self.recorded.seen.roots[: len(layout.bindings)]):
            if root >= 0:
                self._addresses.setdefault(root, set()).add(storage_address(self._slots[index]))
                self._of_inputs.add(storage_address(self._slots[index]))
        for index, stand_in in stand_ins.items():
            self._bound[index] = self.recorded.stand_ins[index] = stand_in
            if address := storage_address(stand_in):
                memory.homes.setdefault(address, (index, stand_in))
            self._addresses[self.recorded.seen.roots[index]].add(storage_address(stand_in))
            self._of_inputs.add(storage_address(stand_in))
            if index in copied:
                copy_into(stand_in, self._slots[index])
        for index in self._padded:
            self._slots[index] = self._bound[index]

    def run(
        self, bar: Progress, policy: Policy, scales: Scales | None = None
    ) -> tuple[tuple[Any, ...], Failure | None]:
        """Run the call, one step after the other.

        Args:
            bar: is told of each step.
            policy: how outputs leave.
            scales: weigh each segment before it is launched, if given.

        Returns:
            The program's outputs, and why there is no plan if there is none.

        Raises:
            Exception: what a live step raises, as it would without any graph.
        """
        self._scales = scales
        try:
            failure = self._run_segments(bar)
            if failure is not None and failure is not self._verdict:
                failure = self._agree(failure)
        except BaseException:
            self._abort()
            raise
        recorded = self.recorded
        captured_below = len(recorded.program.steps)
        if failure is not None:
            captured_below = self._first
            if failure.out_of_memory and not recorded.segments:
                self._give_back()
            run_live(recorded.program, self._slots, self._first)
        for index in padded_inputs_written(recorded):
            copy_into(self._padded[index], recorded.stand_ins[index])
        recorded.outputs = outputs_of(recorded, self._slots, captured_below)
        if failure is None:
            try:
                recorded.outputs = handed_out(recorded, recorded.outputs, self._slots, policy, self._device)
            except Exception as error:  # no memory for a ring: this call still has clones to return
                failure = Failure.of(error)
        try:
            return recorded.outputs.collect(self._slots), failure
        except torch.OutOfMemoryError as error:  # every effect has happened: hand out what there is, and keep no plan
            return recorded.outputs.uncopied().collect(self._slots), Failure.of(error)

    def _agree(self, failure: Failure | None) -> Failure | None:
        """Whether somebody has failed so far. Each rank asks until that is so, so that all stop at the same place."""
        if self._agreement.is_group:
            failures = self._agreement.gather(f"{self.recorded.program.name}: is all well", failure, usual=None)
            failure = Failure.of_ranks(failures)
        self._verdict = failure
        return failure

    def _give_back(self) -> None:
        """Nothing recorded has run, so nothing reads what the recordings hold, and the live run needs the memory."""
        recorded = self.recorded
        for step in recorded.program.steps[self._first :]:
            for slot in step.writes:
                self._slots[slot] = None
        self._bound, recorded.pool = [], None
        if not any(self._slots[slot] is stand_in for slot, stand_in in recorded.stand_ins.items()):
            recorded.blocks.clear()
            recorded.stand_ins.clear()
            recorded.memory.homes.clear()

    def _run_segments(self, bar: Progress) -> Failure | None:
        for number, step in enumerate(self.recorded.program.steps):
            failure = self._live(number) if number in self.recorded.layout.live else self._record(number)
            if failure is not None:
                return failure
            bar.advance(step.name)
        return self._close(len(self.recorded.program.steps))

    def _record(self, number: int) -> Failure | None:
        if self._recording is not None and self._segments[number] != self._segments[number - 1]:
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
                read = [self._bound[slot] for slot in step.reads]
                results = self._recording.call(step.fn, read)
            self.recorded.given |= {s: v for s, v in zip(step.reads, read, strict=True) if s not in self._captured}
            for slot, value in zip(step.writes, results, strict=True):
                self._check_memory(slot, value)
                self._keep_recorded(slot, value)
        except Exception as error:
            self._abort()
            return Failure.of(error, (number,))
        self._release(number)
        return None

    def _keep_recorded(self, slot: int, value: Any) -> None:
        self._slots[slot] = self._bound[slot] = value
        tensor = isinstance(value, torch.Tensor)
        if tensor and self.recorded.seen.roots[slot] == slot:
            self.recorded.memory.pool.add(storage_address(value))
        if slot in self._crossing:
            self.recorded.constants[slot] = weak_view(value) if tensor else value

    def _live(self, number: int) -> Failure | None:
        failure = self._close(number)
        if failure is not None:
            return failure
        step = self.recorded.program.steps[number]
        self._first = number
        if (failure := self._agree(None)) is not None:
            return failure
        self._first = number + 1
        results = step.fn(*[self._slots[slot] for slot in step.reads])
        for slot, value in zip(step.writes, results, strict=True):
            self._slots[slot] = self._bound[slot] = value
        try:
            for slot in step.writes:
                self._check_memory(slot, self._slots[slot])
                self._give_place(number, slot, self._slots[slot])
        except Exception as error:
            return Failure.of(error)
        self.recorded.timeline.append(number)
        self._release(number)
        return None

    def _give_place(self, number: int, slot: int, value: Any) -> None:
        """Let captured steps find a live step's result at an address that lasts."""
        recorded = self.recorded
        bridged = slot in recorded.layout.bridged
        if slot in recorded.layout.fixed or (bridged and storage_address(value) in recorded.memory.homes):
            recorded.places[slot] = value.data_ptr(), value.size()
            self._bound[slot] = weak_view(value)
        elif bridged:
            bridge, chunk = self._bridges.place(value, number, self._last_read.get(slot, len(recorded.program.steps)))
            copy_into(bridge, value)
            recorded.blocks.append(chunk)
            recorded.stand_ins[slot] = self._bound[slot] = bridge
            recorded.memory.homes[storage_address(bridge)] = slot, bridge
            root = recorded.seen.roots[slot]
            self._addresses[root].add(storage_address(bridge))
            if root < len(recorded.program.inputs):
                self._of_inputs.add(storage_address(bridge))

    def _check_memory(self, slot: int, value: Any) -> None:
        """Values must share memory as they did in the warm-up, because the layout was worked out from that."""
        root = self.recorded.seen.roots[slot]
        if (root >= 0) != isinstance(value, torch.Tensor):
            raise RuntimeError(f"slot {slot} held {'a tensor' if root >= 0 else 'no tensor'} in the warm-up only")
        if root < 0:
            return
        address = storage_address(value)
        if root == slot:
            self._addresses[slot] = {address}
            fits = address not in self._of_inputs
        else:
            fits = address in self._addresses[root]
        if address and not fits:
            raise RuntimeError(f"slot {slot} shares memory with other values than in the warm-up")

    def _release(self, number: int) -> None:
        """Give up the memory of results whose last reader has been recorded or has run."""
        for slot in self.recorded.layout.releases[number]:
            value = self._slots[slot]
            if slot not in self._captured:
                self._outlived.append(slot)
                continue
            # A weak view stays: were the current recording to fail, its steps would read it again, unchanged.
            rest = weak_view(value) if isinstance(value, torch.Tensor) else value
            if self._recording is None:
                self._ended.append(rest)
            else:
                self._recording.release(rest)
            self._slots[slot] = self._bound[slot] = rest

    def _close(self, number: int) -> Failure | None:
        """End the current segment and run it."""
        if self._recording is None:
            self._drop_outlived()
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
        for index in inputs_written_back(self.recorded, self._first, number):
            copy_into(self._slots[index], self.recorded.stand_ins[index])
        self._drop_outlived()
        return None

    def _leaves_stream_unjoined(self, number: int) -> bool:
        """Whether a step cannot be ended when it is recorded alone (it never runs): the end of a segment names none.

        The pool of a recording that could not be ended takes no other one, so each step gets the one now in use.
        """
        step = self.recorded.program.steps[number]
        try:
            with self._device.session() as pool, torch.inference_mode(False), torch.no_grad():
                self._recording = self._device.begin(pool, [])
                self._recording.call(step.fn, [self._bound[slot] for slot in step.reads])
                self._recording.end()
        except Exception as error:
            self._abort()
            return isinstance(error, UnjoinedStreamError)
        self._recording = None
        return False

    def _drop_outlived(self) -> None:
        for slot in self._outlived:
            self._slots[slot] = self._bound[slot] = None
        self._outlived = []

    def _abort(self) -> None:
        recording, self._recording = self._recording, None
        if recording is not None:
            recording.abort()


def _crossing_slots(program: Program, segments: Sequence[int]) -> set[int]:
    """Results that are read outside of the segment that makes them, outputs included."""
    made_in = {slot: segments[number] for number, step in enumerate(program.steps) for slot in step.writes}
    crossing = {each for each in program.outputs if isinstance(each, int)}
    for number, step in enumerate(program.steps):
        crossing |= {slot for slot in step.reads if made_in.get(slot) != segments[number]}
    return crossing
