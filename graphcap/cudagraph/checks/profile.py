"""Every step of a plan on the clock: as plain Python, compiled, and replayed from a graph of its own.

The timers sit in the replay itself (``around.py``), so each step is timed on the values that it
gets there. What is run besides the replay runs on copies of the memory that it writes. Before each measurement the
device has nothing to do: a time is what the step takes on its own, launches included.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Any

import torch

from graphcap.cudagraph.checks.around import put_around
from graphcap.cudagraph.checks.rehearsal import Segment, TooLarge, segments_of
from graphcap.cudagraph.hardware.generators import same_random_numbers
from graphcap.cudagraph.program import Program
from graphcap.cudagraph.recording.recorded import Recorded

MAX_COPIED_BYTES = 4 * 2**30  #: of what one step writes; beyond it the step is timed as it runs in the plan only


class Timers:
    """Times the steps of one region; an :class:`~graphcap.cudagraph.checks.verify.Inspector`.

    Attributes:
        samples: per step number and way to run (``"eager"``, ``"compiled"``, ``"replayed"``; ``"live"`` for a step that
            the plan runs live) the seconds of each replay.
    """

    def __init__(self, program: Program, device: torch.device) -> None:
        self.program = program
        self.samples: dict[int, dict[str, list[float]]] = {}
        self._device = device

    def apart(self, key: Any) -> Collection[int]:
        """Every step, so that each can be timed."""
        return range(len(self.program.steps))

    def attach(self, key: Any, recorded: Recorded, replay: Callable[..., Any]) -> None:
        """Put the timers into a plan."""
        groups = segments_of(recorded)

        def segment(number: int, launch: Callable[..., Any]) -> Callable[..., Any]:
            (step,) = groups[number]
            return lambda: self._time_captured(step, Segment(recorded, [step]), launch)

        put_around(replay, recorded, segment=segment, live=self._around_live)

    def _time_captured(self, number: int, segment: Segment, launch: Callable[[], Any]) -> None:
        step = self.program.steps[number]
        for way, fn in (("eager", step.eager), ("compiled", step.fn)):
            if fn is not None:
                self._time_copy(number, way, fn, segment)
        self._time(number, "replayed", launch)

    def _time_copy(self, number: int, way: str, fn: Callable[..., Any], segment: Segment) -> None:
        try:
            with torch.inference_mode(False), torch.no_grad(), same_random_numbers(self._device):
                args = segment.arguments(number, MAX_COPIED_BYTES)
                self._time(number, way, lambda: fn(*args))
        except TooLarge:
            return

    def _around_live(self, number: int, call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: self._time(number, "live", lambda: call(*args))

    def _time(self, number: int, way: str, call: Callable[[], Any]) -> Any:
        result, seconds = timed(call, self._device)
        self.samples.setdefault(number, {}).setdefault(way, []).append(seconds)
        return result


def timed(call: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """The result of a call, and the seconds until the device is done with it; on CUDA between two events."""
    if device.type != "cuda":
        start = time.perf_counter()
        result = call()
        return result, time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    result = call()
    end.record()
    end.synchronize()
    return result, begin.elapsed_time(end) / 1e3
