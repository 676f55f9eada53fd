"""What the ways in take from Dynamo that torch does not promise to keep. Checked on 2.11 and 2.13.

Four things: to know when a trace begins (so that dims are marked only then), the marks themselves, which failures of a
trace are the fault of unbacked dims, and what Dynamo keeps for a function. (Guards have a module of their own, and so
has what a call comes from.)
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from types import CodeType
from typing import Any, NamedTuple

import torch

from graphcap.compiler.frontend.call_dims import TensorDims
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

#: What Inductor takes a declared size to be where it chooses kernels: a batch that a graph is worth it for.
_USUAL_SIZE = 64

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
    else:
        offered = inspect.signature(mark_unbacked).parameters
        wanted = {"shape_id": name, "hint_override": _USUAL_SIZE}
        mark_unbacked(tensor, dim, **{key: value for key, value in wanted.items() if key in offered})


def _copy(value: Any) -> Any:
    return value.copy() if isinstance(value, (set, dict)) else value


def code_being_traced() -> CodeType | None:
    """For a callback of :func:`trace_callbacks`: what Dynamo begins to trace; ``None`` where torch does not tell."""
    frame = sys._getframe()
    while (caller := frame.f_back) is not None:
        if caller.f_code.co_name == "compile_inner":
            code = caller.f_locals.get("code")
            return code if isinstance(code, CodeType) else None
        frame = caller
    return None


class _Demand:
    """That the graphs of our traces are whole. Torch has one flag for all threads, of which one traces at a time."""

    lock = threading.Lock()
    num_calls = 0
    before = False  #: what the first of these calls found


def demand_whole_graph() -> None:
    """At the beginning of a trace: a graph break is an error of it, and nothing of the frame has run yet. The call
    whose trace it is ends this with :func:`end_demand`; calls of several threads may do so in any order."""
    with _Demand.lock:
        if _Demand.num_calls == 0:
            _Demand.before = _breaks_are_errors()
        _Demand.num_calls += 1
        _let_breaks_be_errors(True)


def graph_is_whole() -> None:
    """At the end of such a trace, before its call has ended: what the graph calls may break theirs, and a later call
    that is not traced any more (Dynamo's recompile_limit) is no error."""
    _let_breaks_be_errors(False)
    with contextlib.suppress(ImportError, AttributeError):
        from torch._dynamo.symbolic_convert import InstructionTranslator

        InstructionTranslator.current_tx().error_on_graph_break = False  # what Dynamo remembers of the trace


def end_demand() -> None:
    """At the end of a call that demanded a whole graph."""
    with _Demand.lock:
        _Demand.num_calls -= 1
        if _Demand.num_calls == 0:
            _let_breaks_be_errors(_Demand.before)


# torch._dynamo.error_on_graph_break() is a context manager that puts back what it found: for nested blocks only.


def _breaks_are_errors() -> bool:
    return bool(getattr(torch._dynamo.utils, "_get_error_on_graph_break", bool)())


def _let_breaks_be_errors(value: bool) -> None:
    getattr(torch._dynamo.utils, "_set_error_on_graph_break", bool)(value)


def is_graph_break(error: BaseException) -> bool:
    """Whether a trace under :func:`demand_whole_graph` met a graph break that has nothing to do with unbacked sizes."""
    from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException

    if isinstance(error, BackendCompilerFailed) or not isinstance(error, TorchDynamoException):
        return False
    return not is_data_dependent(error)


def cannot_compile(error: BaseException) -> bool:
    """Whether Dynamo or the backend gave up on a function, and not the function itself."""
    from torch._dynamo.exc import TorchDynamoException

    return isinstance(error, TorchDynamoException)


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


# -- what Dynamo keeps for a function ---------------------------------------------------------------------------------


class CompiledFrame(NamedTuple):
    """One graph of a function: what guards it (``GuardManagerWrapper``), and the code that Dynamo runs instead."""

    manager: Any
    code: CodeType


def compiled_frames(code: CodeType) -> list[CompiledFrame]:
    """What Dynamo has made of a function so far; empty where torch does not tell."""
    try:
        from torch._dynamo.eval_frame import _debug_get_cache_entry_list

        # An entry lives in C++ and may go while Python still holds it: nothing here keeps one.
        return [CompiledFrame(entry.guard_manager, entry.code) for entry in _debug_get_cache_entry_list(code)]
    except (ImportError, AttributeError):
        return []


def forget(code: CodeType) -> None:
    """Drop what Dynamo has made of a function: its next call is traced."""
    from torch._C._dynamo.eval_frame import reset_code

    reset_code(code)


def hook_guards() -> contextlib.AbstractContextManager[Any]:
    """Within it a trace also guards that modules without hooks have none."""
    import torch._dynamo.config as config

    patch: contextlib.AbstractContextManager[Any] = config.patch(skip_nnmodule_hook_guards=False)
    return patch


def graph_without_wrapper(f_globals: Mapping[str, Any], name: str) -> str:
    """How code calls the graph that Dynamo installed as a global, without ``torch.compiler.disable`` around it.

    The wrapper turns the frame hook off, which is off where nothing turned it on.
    """
    graph = f_globals[name]
    if getattr(graph, "_torchdynamo_disable", False) and hasattr(graph, "_torchdynamo_orig_callable"):
        return f"{name}._torchdynamo_orig_callable"
    return name


def leave_functorch_layers() -> None:
    """What Dynamo does when a graph ends in an error: a transform inside of it may not have been left."""
    for _ in range(torch._C._functorch.get_dynamic_layer_stack_depth()):
        with contextlib.suppress(RuntimeError):  # torch 2.11 leaves one layer and then fails an assertion of its own
            torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(0)
