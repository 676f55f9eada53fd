"""A call through Dynamo: its dims are marked when a trace begins during it, and unmarked when it ends."""

from __future__ import annotations

import contextlib
import threading
from types import FunctionType
from typing import Any, Protocol

from graphcap.compiler import private
from graphcap.compiler.frontend import dynamo
from graphcap.compiler.frontend.call_dims import CallDims

UNBACKED = "unbacked"
DYNAMIC = "dynamic"


class Marking(Protocol):
    """What is called.

    Attributes:
        dims: that it has.
        entry: the function that Dynamo sees.
        marking: how its dims are marked: :data:`UNBACKED` or :data:`DYNAMIC`.
        wants_whole_graph: whether a trace of ``entry`` must be one graph.
    """

    dims: CallDims
    entry: FunctionType
    marking: str
    wants_whole_graph: bool


class MarkedCall:
    """A call in progress: what a trace that begins during it has to mark.

    Attributes:
        traced: whether a trace has begun.
        demands: whether it must be one graph.
        has_graph: whether a backend has returned.
    """

    __slots__ = ("_while_tracing", "args", "demands", "has_graph", "kwargs", "saved", "target", "traced")

    def __init__(self, target: Marking, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.target = target
        self.args = args
        self.kwargs = kwargs
        self.traced = False
        self.demands = False
        self.has_graph = False
        self.saved: dynamo.Saved | None = None
        self._while_tracing: contextlib.ExitStack | None = None

    def begin_trace(self) -> None:
        """Mark the dims for a trace that is about to begin. What the target's graph calls is traced as it likes."""
        target = self.target
        if target.wants_whole_graph and not self.demands and dynamo.code_being_traced() is target.entry.__code__:
            self.demands = True
            dynamo.demand_whole_graph()
        self.traced = True
        if self._while_tracing is None:
            self._while_tracing = contextlib.ExitStack()
            self._while_tracing.enter_context(private.exact_slices())
        if self.saved is None:
            self.saved = dynamo.mark(target.dims.tensors(self.args, self.kwargs), target.marking)

    def end(self) -> None:
        """Take the marks away, and the demand back."""
        if self.demands:
            dynamo.end_demand()
        if self._while_tracing is not None:
            self._while_tracing.close()
        if self.saved is not None:
            dynamo.unmark(self.saved)
            self.saved = None


class _InProgress(threading.local):
    """The call of this thread that goes through Dynamo."""

    call: MarkedCall | None = None


in_progress = _InProgress()


def on_trace_start(*_: object) -> None:
    """For Dynamo to call when a trace begins."""
    if (call := in_progress.call) is not None:
        call.begin_trace()


def will_retry(error: BaseException) -> bool:
    """Whether a backend should raise ``error`` instead of making do: the caller will trace again with known sizes."""
    call = in_progress.call
    return call is not None and call.traced and call.target.marking == UNBACKED and dynamo.is_data_dependent(error)
