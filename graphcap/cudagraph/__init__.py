"""Capture and replay of a compiled region: knows callables and tensors, has never heard of FX or Inductor.

In reading order: :mod:`~graphcap.cudagraph.program` (the contract with the compiler),
:mod:`~graphcap.cudagraph.runner` (what happens on a call), :mod:`~graphcap.cudagraph.observe` (what a warm-up learns),
:mod:`~graphcap.cudagraph.layout` and :mod:`~graphcap.cudagraph.bindings` (what is captured, and how inputs get in),
:mod:`~graphcap.cudagraph.capture` (the segmented capture), :mod:`~graphcap.cudagraph.recorded` (what it leaves behind),
:mod:`~graphcap.cudagraph.replay` (the generated replay, with :mod:`~graphcap.cudagraph.lines`,
:mod:`~graphcap.cudagraph.entry_checks` and :mod:`~graphcap.cudagraph.output_lines`),
:mod:`~graphcap.cudagraph.padding`, :mod:`~graphcap.cudagraph.proof` and :mod:`~graphcap.cudagraph.fitted` (which sizes
may be padded, the proof that it changes nothing, one plan for many sizes),
:mod:`~graphcap.cudagraph.outputs` and :mod:`~graphcap.cudagraph.handout` (how outputs leave,
:mod:`~graphcap.cudagraph.generations` how long they last), :mod:`~graphcap.cudagraph.replay` (the generated replay),
:mod:`~graphcap.cudagraph.device` (what a device must do; :mod:`~graphcap.cudagraph.cuda` and
:mod:`~graphcap.cudagraph.simulated` do it).

Which sizes are captured: :mod:`~graphcap.cudagraph.ladder` and :mod:`~graphcap.cudagraph.ladders`. What is learnt from
the calls: :mod:`~graphcap.cudagraph.stats`, :mod:`~graphcap.cudagraph.traffic`, :mod:`~graphcap.cudagraph.suggest` and
:mod:`~graphcap.cudagraph.alerts`. What a step costs and why: :mod:`~graphcap.cudagraph.cost`; which segments are not
worth a graph: :mod:`~graphcap.cudagraph.scales` and :mod:`~graphcap.cudagraph.worth`.
"""

from graphcap.cudagraph.bindings import Binding
from graphcap.cudagraph.choose import device_for
from graphcap.cudagraph.device import GraphDevice
from graphcap.cudagraph.instances import graph_runner
from graphcap.cudagraph.program import Capture, Constant, DimSize, InputKind, InputSpec, Program, Size, Step
from graphcap.cudagraph.runner import GraphRunner
from graphcap.cudagraph.simulated import SimulatedCaptureError
from graphcap.cudagraph.stats import PlanStats, RunnerStats, plans_made
from graphcap.cudagraph.step import Dispatch, GraphKey, step

__all__ = [
    "Binding",
    "Capture",
    "Constant",
    "DimSize",
    "Dispatch",
    "GraphKey",
    "GraphDevice",
    "GraphRunner",
    "InputKind",
    "InputSpec",
    "PlanStats",
    "Program",
    "RunnerStats",
    "SimulatedCaptureError",
    "Size",
    "Step",
    "device_for",
    "graph_runner",
    "step",
    "plans_made",
]
