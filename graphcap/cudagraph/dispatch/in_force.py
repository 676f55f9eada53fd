"""What is in force in this thread or task: the step, and whose buffers ops find instead of its inputs.

Traced code reads it as attributes of this module: ``in_force.step``, ``in_force.names`` (of the step's inputs),
``in_force.has_lens`` and ``in_force.input_lens``. A trace knows no context variables, but it reads an attribute of a
module as Python does, and so do the guards and the code that it leaves behind. What it finds in this way is looked up
anew on every call by the thread or task that calls: tensors are inputs of the graph, and never constants.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphcap.cudagraph.dispatch import step as steps
    from graphcap.cudagraph.dispatch.metadata import Serving

#: The innermost step.
step_now: ContextVar[steps.step | None] = ContextVar("graphcap_step", default=None)
#: Whose buffers ops of the model find instead of the step's own inputs.
serving_now: ContextVar[Serving | None] = ContextVar("graphcap_serving", default=None)

#: How the attributes begin that say whether the step has an input, and that are the inputs. (``current_step.py`` spells
#: them out.)
HAS, INPUT = "has_", "input_"


def __getattr__(name: str) -> Any:
    said = step_now.get()
    if name == "is_traceable":
        # Not so for the code of an op in a call that is watched, padded or captured: that must find the buffers.
        return said is not None and said.inputs.asked is None and serving_now.get() is None
    if said is not None:
        inputs = said.inputs
        if name.startswith(INPUT) and (wanted := name.removeprefix(INPUT)) in inputs.given:
            return inputs.for_a_trace(wanted)
        if name == "step":
            return said
        if name == "names":
            return tuple(inputs.given)
        if name.startswith(HAS):
            return name.removeprefix(HAS) in inputs.given
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def inputs_found(present: tuple[str, ...], absent: tuple[str, ...]) -> tuple[Any, ...]:
    """What traced code would find as the inputs ``present``, in order. Where it would miss one of these, find one of
    ``absent``, or may not look: a longer tuple, of what is no input."""
    said = step_now.get()
    if said is None or said.inputs.asked is not None or serving_now.get() is not None:
        return _nothing(present)
    names = said.inputs.names
    if not names.isdisjoint(absent) or not names.issuperset(present):
        return _nothing(present)
    return tuple([said.inputs.for_a_trace(name) for name in present])


def _nothing(present: tuple[str, ...]) -> tuple[Any, ...]:
    return (...,) * (len(present) + 1)
