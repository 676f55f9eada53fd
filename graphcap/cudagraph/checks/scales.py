"""What the segments of one capture cost the host and the device, replayed and run live.

A segment is weighed when it has been recorded and is about to be launched, with everything in place that it reads. It
is replayed a few times, and what a replay overwrites is put back after each; its steps run live on copies of what they
write. What follows finds everything as if nothing had happened.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphcap.cudagraph.checks.rehearsal import Segment
from graphcap.cudagraph.counters.cost import StepTime
from graphcap.cudagraph.hardware.device import Stopwatch
from graphcap.cudagraph.hardware.generators import same_random_numbers
from graphcap.cudagraph.recording.recorded import Recorded, describe

_log = logging.getLogger("graphcap.cudagraph")

_RUNS = 5  #: measurements of each kind, of which the median counts
_MAX_STEPS = 4  #: of a segment; more of them take the host longer than one launch
_MAX_LIVE_US = 200.0  #: host time; what takes longer is worth a graph in any case, and is not run again
_MAX_BYTES = 2**28  #: of copies; what is larger is no small segment


@dataclass(frozen=True, slots=True)
class Weighed:
    """One segment.

    Attributes:
        steps: their numbers.
        live: the times of its steps run live, with the copies that captured readers of their results would need.
        replayed: those of its replay.
    """

    steps: tuple[int, ...]
    live: StepTime
    replayed: StepTime


class Scales:
    """Weighs the segments of one capture. Those that call the same functions are one kind, of which one is measured.

    Attributes:
        weighed: those that are small enough and could be measured, in order.
    """

    def __init__(self, stopwatch: Stopwatch, device: torch.device, spare_bytes: int) -> None:
        """Nothing is measured yet; copies take at most ``spare_bytes`` at a time."""
        self.weighed: list[Weighed] = []
        self._stopwatch = stopwatch
        self._device = device
        self._max_bytes = min(_MAX_BYTES, spare_bytes // 2)
        self._kinds: dict[tuple[int, ...], tuple[StepTime, StepTime] | None] = {}  # live and replayed

    def weigh(self, recorded: Recorded, numbers: Sequence[int], replay: Callable[[], None]) -> None:
        """Measure the segment of these steps, which is about to be launched. Never raises."""
        steps = [recorded.program.steps[number] for number in numbers]
        # What is captured on somebody's word is not run more often than needed.
        if len(steps) > _MAX_STEPS or any(step.unproven for step in steps):
            return
        kind = tuple(id(step.fn) for step in steps)
        if kind not in self._kinds:
            self._kinds[kind] = self._measured(recorded, numbers, replay)
        times = self._kinds[kind]
        if times is not None:
            self.weighed.append(Weighed(tuple(numbers), *times))

    def _measured(
        self, recorded: Recorded, numbers: Sequence[int], replay: Callable[[], None]
    ) -> tuple[StepTime, StepTime] | None:
        """Live and replayed; ``None`` for what is worth a graph in any case, or cannot be measured."""
        try:
            with torch.inference_mode(False), torch.no_grad(), same_random_numbers(self._device):
                segment = Segment(recorded, numbers)
                run = segment.repeatable(self._max_bytes)
                if self._stopwatch(run).host_us > _MAX_LIVE_US:
                    return None
                live = self._median(_with_bridges(run, recorded, numbers))
                put_back = segment.keep(self._max_bytes)
                return live, self._median(replay, put_back)
        except Exception as error:  # the capture itself needs none of this
            _log.debug("%s: a segment was not measured: %s", recorded.program.name, describe(error))
            return None

    def _median(self, call: Callable[[], object], after: Callable[[], None] = lambda: None) -> StepTime:
        times = []
        for _ in range(_RUNS):
            try:
                times.append(self._stopwatch(call))
            finally:
                after()
        host, gpu = [each.host_us for each in times], [each.gpu_us for each in times]
        return StepTime(statistics.median(host), statistics.median(gpu))


def _with_bridges(run: Callable[[], dict[int, Any]], recorded: Recorded, numbers: Sequence[int]) -> Callable[[], None]:
    """Run these steps and copy what captured steps read of their results."""
    values = run()
    targets = [(slot, torch.empty_like(values[slot])) for slot in _bridged(recorded, numbers, values)]

    def run_and_copy() -> None:
        values = run()
        for slot, target in targets:
            target.copy_(values[slot])

    return run_and_copy


def _bridged(recorded: Recorded, numbers: Sequence[int], values: dict[int, Any]) -> list[int]:
    """The results that captured steps of other segments read: they would be copied if these steps ran live."""
    made = {slot for number in numbers for slot in recorded.program.steps[number].writes}
    readers = [
        step
        for number, step in enumerate(recorded.program.steps)
        if number not in recorded.layout.live and number not in numbers
    ]
    read = dict.fromkeys(slot for step in readers for slot in step.reads if slot in made)
    return [slot for slot in read if isinstance(values[slot], torch.Tensor)]
