"""Stopwatches for the simulated device, whose own times say nothing: what is measured is what a test says."""

from __future__ import annotations

from collections.abc import Callable

from graphcap.cudagraph.counters.cost import StepTime
from graphcap.cudagraph.hardware.simulated import SimulatedDevice
from graphcap.cudagraph.hardware.simulated_recording import SimulatedSegment


class Clock:
    """Runs what it is given. A replay takes ``replay_us``; live steps take what they say, with :meth:`taking`.

    Attributes:
        measured: the host time of each call, in order.
    """

    def __init__(self, replay_us: float = 8.0) -> None:
        self.replay_us = replay_us
        self.measured: list[float] = []
        self._spent = 0.0

    def __call__(self, call: Callable[[], object]) -> StepTime:
        self._spent = 0.0
        call()
        is_replay = isinstance(getattr(call, "__self__", None), SimulatedSegment)
        self.measured.append(self.replay_us if is_replay else self._spent)
        return StepTime(self.measured[-1], self.measured[-1])

    def taking(self, us: float, fn: Callable[..., object]) -> Callable[..., object]:
        """The same function, which spends so many microseconds when it runs live."""

        def run(*args: object) -> object:
            self._spent += us
            return fn(*args)

        return run


def timed_device(clock: Callable[[Callable[[], object]], StepTime]) -> SimulatedDevice:
    device = SimulatedDevice()
    device.stopwatch = clock
    return device
