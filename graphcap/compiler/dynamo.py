"""What the ways in take from Dynamo that torch does not promise to keep. Checked on 2.11 and 2.13.

Three things: to know when a trace begins (so that dims are marked only then), the marks themselves, and which failures
of a trace are the fault of unbacked dims.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from types import CodeType
from typing import Any

import torch

from graphcap.compiler.call_dims import TensorDims
from graphcap.errors import GraphcapError

log = logging.getLogger("graphcap.compiler")

#: Every attribute that Dynamo's marking functions set on a tensor.
_MARKS = (
    "_has_dynamo_dim_marking",
    "_dynamo_unbacked_indices",
    "_dynamo_weak_dynamic_indices",
    "_dynamo_hint_overrides",
    "_dynamo_shape_ids",
    "_specialize_on",
)

#: Per tensor, what the attributes of ``_MARKS`` were before.
Saved = list[tuple[torch.Tensor, dict[str, Any]]]


def trace_callbacks() -> list[Callable[..., None]]:
    """What Dynamo calls when it begins to trace, in any thread. ``torch._dynamo.reset()`` empties the list."""
    from torch._dynamo.callback import callback_handler

    return callback_handler.start_callbacks


def mark(tensors: Sequence[TensorDims], marking: str) -> Saved:
    """Mark dims as ``"unbacked"`` or ``"dynamic"``, and return what :func:`unmark` needs."""
    saved: Saved = [(t, {k: _copy(v) for k, v in vars(t).items() if k in _MARKS}) for t, _ in tensors]
    for tensor, names in tensors:
        for dim, name in names.items():
            try:
                _mark_one(tensor, dim, name, marking)
            except Exception as error:  # a tensor subclass that torch cannot mark: it is traced at its own size
                log.info("dim %d (%s) of a %s stays unmarked: %s", dim, name, type(tensor).__name__, error)
    return saved


def unmark(saved: Saved) -> None:
    """Put the attributes back as they were, so that no other compiled function sees our marks."""
    for tensor, before in saved:
        attributes = vars(tensor)
        for key in _MARKS:
            attributes.pop(key, None)
        attributes.update(before)


def _mark_one(tensor: torch.Tensor, dim: int, name: str, marking: str) -> None:
    from torch._dynamo.decorators import mark_unbacked, maybe_mark_dynamic

    if marking == "dynamic":
        # maybe_: a size that the code fixes is specialised, where mark_dynamic would log a page and raise.
        maybe_mark_dynamic(tensor, dim)
    elif "shape_id" in inspect.signature(mark_unbacked).parameters:
        mark_unbacked(tensor, dim, shape_id=name)
    else:
        mark_unbacked(tensor, dim)


def _copy(value: Any) -> Any:
    return value.copy() if isinstance(value, (set, dict)) else value


@contextlib.contextmanager
def whole_graph() -> Iterator[None]:
    """Within it a graph break is an error of the trace: nothing of the frame has run yet."""
    with _error_on_graph_break(True):
        yield


def graph_is_whole() -> None:
    """End the demand of :func:`whole_graph` before its ``with`` does: what the graph calls may break theirs."""
    # Not left again: the end of whole_graph restores what was before it.
    _error_on_graph_break(False).__enter__()


def _error_on_graph_break(value: bool) -> contextlib.AbstractContextManager[None]:
    toggle = getattr(torch._dynamo, "error_on_graph_break", None)
    return toggle(value) if toggle is not None else contextlib.nullcontext()


def is_graph_break(error: BaseException) -> bool:
    """Whether a trace under :func:`whole_graph` met a graph break that has nothing to do with unbacked sizes."""
    from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException

    if isinstance(error, BackendCompilerFailed) or not isinstance(error, TorchDynamoException):
        return False
    return not is_data_dependent(error)


def is_data_dependent(error: BaseException) -> bool:
    """Whether the trace, or the compilation of its graph, needed the value of a size that it was told not to know."""
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    queue, seen = [error], set()
    while queue:
        current = queue.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, GuardOnDataDependentSymNode) or "data-dependent expression" in str(current):
            return True
        linked = (current.__cause__, current.__context__, getattr(current, "inner_exception", None))
        queue.extend(other for other in linked if isinstance(other, BaseException))
    return False


def own_error(error: BaseException) -> GraphcapError | None:
    """The error of ours that Dynamo wrapped when the backend raised it."""
    inner = getattr(error, "inner_exception", error)
    return inner if isinstance(inner, GraphcapError) else None


def has_run(code: CodeType, error: BaseException, has_graph: bool) -> bool:
    """Whether ``error`` came out of the running frame of ``code``, and not out of its compilation.

    Args:
        code: what Dynamo was to compile.
        error: what came instead of a result.
        has_graph: whether a backend returned during this call. After that only guards can fail before the frame runs.
    """
    from torch._dynamo.exc import TorchDynamoException

    if isinstance(error, TorchDynamoException):
        return has_graph  # Dynamo strips the traceback, also of one that a function called by the frame raised
    where = (code.co_filename, code.co_name)
    trace = error.__traceback__
    while trace is not None:
        if (trace.tb_frame.f_code.co_filename, trace.tb_frame.f_code.co_name) == where:
            return True
        trace = trace.tb_next
    return False
