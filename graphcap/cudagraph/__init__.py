"""Capture and replay of a compiled region: knows callables and tensors, has never heard of FX or Inductor.

In reading order, the way of a call:

======================================  ===========================================================================
the contract with the compiler          ``program.py``
what happens on a call                  ``runner.py``, ``plan_table.py`` (the plans, and the ways to them), ``plan.py``
which plan is for it                    ``step.py`` (what the caller says of the batch), ``routes.py``, ``ladder.py``,
                                        ``ladders.py``
the calls that lead to a plan           ``maker.py``, ``attempts.py`` (when, and whether at all), ``phase.py``
what a warm-up learns                   ``observe.py``, ``liveness.py``
what is captured, how inputs get in     ``layout.py``, ``bindings.py``, ``moves.py``, ``arena.py`` (static memory)
the recording                           ``capture.py``, ``bridges.py`` (from live steps to captured ones),
                                        ``recorded.py`` (what it leaves behind)
the replay                              ``replay.py`` (a generated function), ``lines.py``, ``entry_checks.py``,
                                        ``output_lines.py`` (its parts), ``around.py`` (what is put around it)
how results leave                       ``outputs.py``, ``handout.py``, ``generations.py`` (how long they last)
======================================  ===========================================================================

Then, by theme:

======================================  ===========================================================================
padding                                 ``padding.py`` (which sizes), ``corner.py``, ``proof.py`` (that it changes
                                        nothing), ``scratch.py``, ``compare.py``, ``blame.py``, ``fitted.py`` (one plan
                                        for many sizes), ``metadata.py`` (the inputs of a step)
replays against live runs               ``verify.py``, ``plan_check.py``, ``rehearsal.py``, ``differences.py``
devices                                 ``device.py`` (what one must do), ``cuda.py``, ``simulated.py``, ``devices.py``,
                                        ``choose.py``, ``hooks.py``, ``generators.py``
memory                                  ``budget.py``, ``memory.py``, ``instances.py`` (whose plans go with which model)
several ranks                           ``agreement.py`` (what they decide together)
what calls teach                        ``stats.py``, ``traffic.py``, ``alerts.py``, ``suggest.py``
what a step costs                       ``profile.py``, ``cost.py``, ``annotate.py`` (names in traces)
what is worth a graph                   ``worth.py``, ``scales.py`` (measures it at the first capture)
======================================  ===========================================================================

``private.py`` holds what is private to torch.
In reading order: :mod:`~graphcap.cudagraph.program` (the contract with the compiler),
:mod:`~graphcap.cudagraph.runner` (what happens on a call), :mod:`~graphcap.cudagraph.routes` (what it leads to),
:mod:`~graphcap.cudagraph.maker` and :mod:`~graphcap.cudagraph.plan_capture` (the calls that lead to a plan),
:mod:`~graphcap.cudagraph.observe` (what a warm-up learns),
:mod:`~graphcap.cudagraph.layout` and :mod:`~graphcap.cudagraph.bindings` (what is captured, and how inputs get in),
:mod:`~graphcap.cudagraph.capture` (the segmented capture), :mod:`~graphcap.cudagraph.recorded` (what it leaves behind),
:mod:`~graphcap.cudagraph.replay` (the generated replay),
:mod:`~graphcap.cudagraph.padding`, :mod:`~graphcap.cudagraph.proof` and :mod:`~graphcap.cudagraph.fitted` (which sizes
may be padded, the proof that it changes nothing, one plan for many sizes),
:mod:`~graphcap.cudagraph.outputs` and :mod:`~graphcap.cudagraph.handout` (how outputs leave,
:mod:`~graphcap.cudagraph.generations` how long they last), :mod:`~graphcap.cudagraph.replay` (the generated replay),
:mod:`~graphcap.cudagraph.device` (what a device must do; :mod:`~graphcap.cudagraph.cuda` and
:mod:`~graphcap.cudagraph.simulated` do it).

Which sizes are captured: :mod:`~graphcap.cudagraph.ladder`, :mod:`~graphcap.cudagraph.ladders`,
:mod:`~graphcap.cudagraph.key_dims` and :mod:`~graphcap.cudagraph.key_ladder`. How long a decision holds:
:mod:`~graphcap.cudagraph.revision`. What is learnt from
the calls: :mod:`~graphcap.cudagraph.stats`, :mod:`~graphcap.cudagraph.traffic`, :mod:`~graphcap.cudagraph.suggest` and
:mod:`~graphcap.cudagraph.alerts`. What a step costs and why: :mod:`~graphcap.cudagraph.cost`.
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
