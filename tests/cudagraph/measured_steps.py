"""Decode steps of the lab decoder as measured on one H200 (torch 2.11.0, Triton 3.6.0, 2026-11-21).

Medians of ``bench/results/decode.json`` of that day in microseconds per step; the GPU's busy time from a profile of the
FULL graph. Launches without graphs are counted, not measured: operations that eager PyTorch dispatches outside of
attention, views left out, and four for each attention.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from graphcap.cudagraph.counters.cost import StepCost


class Measured(NamedTuple):
    """Microseconds of a step; ``compiled`` is torch.compile without graphs, the graphs are the hand-made ones."""

    eager: float
    compiled: float
    piecewise: float | None
    full: float | None


MEASURED = {
    ("0.6b", 1): Measured(14166, 6006, 1788, 1475),
    ("0.6b", 64): Measured(15227, 6453, 2137, 1852),
    ("8b", 1): Measured(14438, 5859, 4894, 4559),
    ("8b", 64): Measured(14738, 6237, 5901, 5454),
}

#: The same in an earlier process; the hand-made graphs of the large model were not measured.
OTHER_RUN = {
    ("0.6b", 1): Measured(13070, 4812, 1723, 1456),
    ("0.6b", 64): Measured(14030, 5011, 2154, 1828),
    ("8b", 1): Measured(16405, 7147, None, None),
    ("8b", 64): Measured(17491, 7086, None, None),
}
#: Host time of a hand-made PIECEWISE step.
PIECEWISE_HOST_US = {("0.6b", 1): 1704, ("0.6b", 64): 1914, ("8b", 1): 1699, ("8b", 64): 2060}

LAYERS = {"0.6b": 28, "8b": 32}
KERNELS = {"0.6b": 393, "8b": 481}
DISPATCHED = {"0.6b": 1103, "8b": 1259}
BUSY_US = {("0.6b", 1): 1298, ("0.6b", 64): 1697, ("8b", 1): 4413}  # of 8b at 64 there is no profile

# What the model cannot know of the machine, each taken from one row.
EAGER_LAUNCH_US = MEASURED["0.6b", 1].eager / (DISPATCHED["0.6b"] + 4 * LAYERS["0.6b"])
COMPILED_LAUNCH_US = MEASURED["0.6b", 1].compiled / KERNELS["0.6b"]
GAP_US = (MEASURED["0.6b", 1].full - BUSY_US["0.6b", 1]) / KERNELS["0.6b"]
BOUNDARY_US = (MEASURED["0.6b", 64].piecewise - MEASURED["0.6b", 64].full) / LAYERS["0.6b"]
ATTENTION_US = 52.0  # host time of one live attention
REPLAY_US = 7.0  # host time of one piece's replay


def eager_step(model: str, batch: int) -> StepCost:
    """The step without graphs as eager PyTorch launches it."""
    layers = LAYERS[model]
    return StepCost(
        launches=DISPATCHED[model] + 4 * layers,
        launch_us=EAGER_LAUNCH_US,
        gpu_us=BUSY_US.get((model, batch)) or MEASURED[model, batch].full - KERNELS[model] * GAP_US,
        kernels=KERNELS[model],
        segments=layers + 1,
        live_us=layers * ATTENTION_US,
        replay_us=REPLAY_US,
        gap_us=GAP_US,
        boundary_us=BOUNDARY_US,
    )


def compiled_step(model: str, batch: int) -> StepCost:
    """The step without graphs as Inductor's code launches it: one launch for each kernel."""
    return dataclasses.replace(eager_step(model, batch), launches=KERNELS[model], launch_us=COMPILED_LAUNCH_US)


def predicted(model: str, batch: int) -> Measured:
    """What the model says of a row."""
    eager, compiled = eager_step(model, batch), compiled_step(model, batch)
    return Measured(
        eager.without_graphs().us, compiled.without_graphs().us, compiled.piecewise().us, compiled.full().us
    )
