"""Capture and replay of a compiled region: knows callables and tensors, has never heard of FX or Inductor.

The way of a call, in reading order:

``program.py``        the contract with the compiler: a flat list of steps over numbered slots
``runner.py``         what happens on a call: one look-up, one replay; ``instances.py`` has one for each model instance
``outlook.py``        what is going to happen to a call or a batch, asked before it
``maker.py``          the calls that lead to a plan: warm-up, proof of padding (``proofs.py``: for which calls it is
                      good); ``plan_capture.py`` captures it and ``plan_writer.py`` writes it
``agreement.py``      what several ranks decide together

and the folders, each with one theme:

``dispatch/``         what batch a call is (``step.py``), which mode and size it gets (``routes.py``: a
                      ``route.py`` each), the ladder
``recording/``        what a warm-up shows (``observe.py``), of one size and of others (``knowledge.py``), what is
                      captured and how inputs get in (``layout.py``, ``bindings.py``), the segmented capture
                      (``capture.py``) with its slot table (``values.py``), static memory (``arena.py``)
``replaying/``        the plan, its generated replay (``replay.py``), how outputs leave (``outputs.py``, ``handout.py``)
``padded/``           which sizes may be padded, the proof that it changes nothing, one plan for many sizes
``checks/``           replays compared with live runs (``verify.py``), timed (``profile.py``), weighed (``worth.py``)
``hardware/``         what a device must do (``device.py``), CUDA, the simulated device, the memory budget, hooks
``counters/``         what is counted, and what it teaches: alerts, a better ladder, a model of costs

``private.py`` holds what is private to torch.
"""

from graphcap.cudagraph.counters import cost
from graphcap.cudagraph.counters.stats import PlanStats, RunnerStats, plans_made
from graphcap.cudagraph.dispatch.key import Dispatch, GraphKey
from graphcap.cudagraph.dispatch.step import step
from graphcap.cudagraph.hardware.choose import device_for
from graphcap.cudagraph.hardware.device import GraphDevice
from graphcap.cudagraph.hardware.simulated_recording import SimulatedCaptureError
from graphcap.cudagraph.instances import graph_runner
from graphcap.cudagraph.program import ANY, Capture, Constant, DimSize, InputKind, InputSpec, Program, Size, Step
from graphcap.cudagraph.recording.bindings import Binding
from graphcap.cudagraph.runner import GraphRunner

__all__ = [
    "ANY",
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
    "cost",
    "device_for",
    "graph_runner",
    "step",
    "plans_made",
]
