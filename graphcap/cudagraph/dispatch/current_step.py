"""``graphcap.current_step()``: the step in force, for ops and for traced code.

Traced code gets one object that is the same for all steps and holds nothing, so that a trace keeps no step: what it
asks for is looked up in :mod:`~graphcap.cudagraph.dispatch.in_force`. What a trace cannot do there breaks its graph,
and runs as Python. Every global of this module that a trace meets is one more guard of each call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch.compiler import is_dynamo_compiling

from graphcap.config import CUDAGraphMode
from graphcap.cudagraph.dispatch import in_force
from graphcap.cudagraph.dispatch.key import Dispatch, GraphKey
from graphcap.cudagraph.private import break_trace
from graphcap.errors import StepError

if TYPE_CHECKING:
    from graphcap.cudagraph.dispatch.step import step


def current_step() -> step:
    """The innermost step in force.

    In traced code, what is read of it becomes an input of the graph (a tensor) or something that is guarded on
    (everything else).

    Raises:
        StepError: outside of every step.
    """
    if is_dynamo_compiling():
        if in_force.is_traceable:
            traced: step = _TRACED
            return traced
        break_trace("no graphcap.step(...) is in force here, or an op reads it")
    found = in_force.step_now.get()
    if found is None:
        raise StepError("no graphcap.step(...) is in force here")
    return found


class TracedInputs(Mapping[str, Any]):
    """The inputs of the step, for traced code. Behind a graph break they are those of the step itself."""

    __slots__ = ()

    def __getitem__(self, name: str) -> Any:
        if is_dynamo_compiling():
            if name.isidentifier() and name in self:
                return getattr(in_force, "input_" + name)
            break_trace(f"this step has no input {name!r}, or its name is no identifier")
        return current_step().inputs[name]

    def __contains__(self, name: object) -> bool:
        return bool(getattr(in_force, f"has_{name}")) if is_dynamo_compiling() else name in current_step().inputs

    def get(self, name: str, default: Any = None) -> Any:
        """The input, or ``default`` where the step has none of this name."""
        if name not in self:
            return default
        return self[name]

    def __iter__(self) -> Iterator[str]:
        return iter(in_force.names if is_dynamo_compiling() else current_step().inputs)

    def __len__(self) -> int:
        return len(in_force.names if is_dynamo_compiling() else current_step().inputs)


class TracedStep:
    """What :class:`graphcap.step` says about a batch, for traced code."""

    __slots__ = ()

    inputs = TracedInputs()

    @property
    def key(self) -> GraphKey | None:
        """The batch."""
        key: GraphKey | None = in_force.step.key
        return key

    @property
    def dispatch(self) -> Dispatch | None:
        """The decision that calls follow."""
        dispatch: Dispatch | None = in_force.step.dispatch
        return dispatch

    @property
    def max_mode(self) -> CUDAGraphMode | None:
        """The most that calls may use."""
        mode: CUDAGraphMode | None = in_force.step.max_mode
        return mode


_TRACED: Any = TracedStep()
