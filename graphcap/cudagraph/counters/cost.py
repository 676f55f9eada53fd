"""A small model of what a step costs without graphs, in PIECEWISE and in FULL, and of where graphs stop to matter.

A step has two clocks. The host launches work, the GPU does it, and the slower of the two sets the pace::

    no graphs   host = launches * launch_us                               GPU = gpu_us
    PIECEWISE   host = fixed_us + segments * replay_us + live_us          GPU = FULL's + boundaries * boundary_us
    FULL        host = fixed_us + replay_us                               GPU = gpu_us + kernels * gap_us
    step        max(host, GPU)

``gpu_us`` is the time in which the GPU is busy, whatever launched the work. In a graph a little time passes between two
kernels (``gap_us``), and at each change between a graph and live work the GPU waits (``boundary_us``); both are lost in
the shadow of the launches where there is no graph, so that row leaves them out. Steps are taken to run back to back and
the two clocks to overlap fully; a step that waits for its result pays more.

``docs/cost-model.md`` compares the model with measured steps. What a machine costs per launch has to be measured on it:
the numbers there are of one machine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """What the model needs to know of a step. Times are microseconds.

    Attributes:
        launches: operations that the host launches one by one in a step without graphs, those of live parts included.
        launch_us: host time of each, with the Python and the dispatcher around it.
        gpu_us: time in which the GPU is busy.
        kernels: kernels inside the graphs of a step.
        segments: graphs that a PIECEWISE step replays.
        live_us: host time of all live parts of a PIECEWISE step.
        replay_us: host time of launching one graph.
        fixed_us: host time of a call around the graphs: guards, checks, copies of inputs and outputs.
        gap_us: GPU time lost between two kernels of a graph.
        boundary_us: GPU time lost at each live part between two graphs.
    """

    launches: int
    launch_us: float
    gpu_us: float
    kernels: int
    segments: int = 1
    live_us: float = 0.0
    replay_us: float = 7.0
    fixed_us: float = 0.0
    gap_us: float = 0.4
    boundary_us: float = 10.0

    def without_graphs(self) -> StepTime:
        """A step whose work is launched one by one."""
        return StepTime(self.launches * self.launch_us, self.gpu_us)

    def piecewise(self) -> StepTime:
        """A step of ``segments`` replays with a live part between each two."""
        host = self.fixed_us + self.segments * self.replay_us + self.live_us
        return StepTime(host, self.full().gpu_us + (self.segments - 1) * self.boundary_us)

    def full(self) -> StepTime:
        """A step that is one replay."""
        return StepTime(self.fixed_us + self.replay_us, self.gpu_us + self.kernels * self.gap_us)

    def __str__(self) -> str:
        times = {"no graphs": self.without_graphs(), "PIECEWISE": self.piecewise(), "FULL": self.full()}
        return "; ".join(f"{name} {time}" for name, time in times.items())


@dataclass(frozen=True, slots=True)
class StepTime:
    """The two clocks of a step, microseconds."""

    host_us: float
    gpu_us: float

    @property
    def us(self) -> float:
        """Microseconds of a step."""
        return max(self.host_us, self.gpu_us)

    @property
    def bound(self) -> str:
        """The clock that sets the pace: ``"host"`` or ``"GPU"``."""
        return "host" if self.host_us > self.gpu_us else "GPU"

    def __str__(self) -> str:
        return f"{self.us:.0f} us ({self.bound}-bound)"


def over_batches(cost: StepCost, small: tuple[int, float], large: tuple[int, float]) -> Callable[[int], StepCost]:
    """The step at any batch, on a straight line through the ``(batch, gpu_us)`` of two: host times do not change.

    Raises:
        ValueError: both are of one batch.
    """
    (small_batch, small_us), (large_batch, large_us) = small, large
    if small_batch == large_batch:
        raise ValueError(f"a line through two batches needs two of them, got {small_batch} twice")
    slope = (large_us - small_us) / (large_batch - small_batch)
    return lambda batch: dataclasses.replace(cost, gpu_us=small_us + slope * (batch - small_batch))


def crossover(cost_at: Callable[[int], StepCost], batches: Iterable[int], least_gain: float = 0.05) -> int | None:
    """The batch from which on graphs are not worth having: FULL saves less than ``least_gain`` of a step without them.

    Args:
        cost_at: the step at a batch; see :func:`over_batches`.
        batches: those to look at.
        least_gain: a part of the step without graphs, 0 to 1.

    Returns:
        The smallest of the batches for which it holds, and for all larger ones too; ``None`` where there is none.
    """
    found = None
    for batch in sorted(batches, reverse=True):
        cost = cost_at(batch)
        live = cost.without_graphs().us
        if live - cost.full().us >= least_gain * live:
            break
        found = batch
    return found


def worth_a_graph(live: StepTime, replay: StepTime, least_gain: float = 0.2) -> bool:
    """Whether a segment stays a graph.

    It is given up where running its steps live takes the host less time, by a clear part of the replay's, and the GPU
    no more. Where the two are close the graph stays: a live part in the middle of a step makes its neighbours copy.

    Args:
        live: the segment's steps run live, measured.
        replay: its replay, measured in the same way.
        least_gain: a part of the replay's host time, 0 to 1.

    A time that could not be measured (NaN) is no reason to give a graph up.
    """
    return not (live.host_us <= (1 - least_gain) * replay.host_us and live.gpu_us <= replay.gpu_us)
