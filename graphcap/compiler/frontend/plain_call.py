"""Whether a call comes from plain Python, and in which of torch's modes: what decides beside guards what it runs.

Private API of torch, checked on 2.11, 2.13 and 2.14.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from graphcap import native
from graphcap.native.objects import Question


def plain_caller() -> Callable[[], bool]:
    """A function that says whether a call comes from plain Python: only guards decide then what runs.

    False where ``torch.compile``'s wrapper or the frame hook would do something else, or where we cannot know: inside
    of a trace (Dynamo, fx, ``torch.jit``), of a function that Dynamo runs, of functorch transforms or a dispatch mode,
    and under ``set_stance``. (``torch._dynamo.config.disable`` stops traces, and not the use of what was traced.)

    Raises:
        AttributeError, ImportError: something of this is kept elsewhere in this version of torch.
    """
    import torch._dynamo.eval_frame as eval_frame

    questions = _questions()
    for function, arguments, _ in questions:
        function(*arguments)  # a check takes an error for a no
    _is_default(eval_frame._stance)
    functions_say_so = native.answer_check(questions)
    return lambda: functions_say_so() and _is_default(eval_frame._stance)


def plain_questions() -> list[Question]:
    """The same for calls with tensors that are not fake, by threads that are in the modes of now, where
    :func:`plain_entries` hold: what is left to ask with :func:`graphcap.native.answer_check`. A call from plain Python
    has to be in progress."""
    from torch._C._dynamo.eval_frame import get_eval_frame_callback

    # Functorch's transforms, dispatch modes and torch.jit's traces show in the thread's modes, others in the tensors.
    of_thread = [] if _fx_has_one_flag() else [_is_fx_tracing()]
    return [(native.thread_state(), (), True), (get_eval_frame_callback, (), None), *of_thread]


def plain_entries() -> list[tuple[dict[str, Any], str, object]]:
    """What has to stay in dicts, for :func:`graphcap.native.identity_check`: the stance, that fx does not trace, and
    the default device, which is guarded."""
    import torch._dynamo.eval_frame as eval_frame
    import torch.utils._device as devices

    places: list[tuple[Any, str]] = [(eval_frame, "_stance"), (devices, "CURRENT_DEVICE")]
    if _fx_has_one_flag():
        places.append((torch.fx._symbolic_trace, "_is_fx_tracing_flag"))
    return [(vars(module), name, getattr(module, name)) for module, name in places]


def _fx_has_one_flag() -> bool:
    """For all threads; from torch 2.14 on each has its own."""
    return hasattr(torch.fx._symbolic_trace, "_is_fx_tracing_flag")


def _is_fx_tracing() -> Question:
    tracing: Any = torch.fx._symbolic_trace
    if _fx_has_one_flag():
        return getattr, (tracing, "_is_fx_tracing_flag"), False
    return getattr, (tracing._is_fx_tracing_tls, "flag", False), False


def _questions() -> list[Question]:
    from torch._C._dynamo.eval_frame import get_eval_frame_callback
    from torch._C._functorch import get_dynamic_layer_stack_depth
    from torch._guards import TracingContext

    # try_get() asks for an attribute that is usually missing: five times as slow as a look into the dict of the thread.
    of_threads = getattr(torch._guards, "_TLS", None)
    tracing_context = TracingContext.try_get if of_threads is None else lambda: vars(of_threads).get("tracing_context")
    return [
        (get_eval_frame_callback, (), None),
        (torch._C._len_torch_dispatch_stack, (), 0),
        (get_dynamic_layer_stack_depth, (), 0),
        (torch._C._is_tracing, (), False),
        _is_fx_tracing(),
        (tracing_context, (), None),
    ]


def question_of(guard: Callable[[dict[str, Any]], bool]) -> Question | None:
    """A guard on torch's modes as a question; ``None`` where there is nothing to ask while a thread stays in the modes
    of now and :func:`plain_entries` hold. A call for which the guard holds has to be in progress.

    What is left of the guard on the global state without autocast are settings of the process: the default dtype, what
    matrix products may round, whether algorithms are deterministic, how many threads there are.
    """
    kind = type(guard).__name__
    told = {
        "DEFAULT_DEVICE": True,
        "TORCH_FUNCTION_MODE_STACK": not torch._C._len_torch_function_stack(),
        "GLOBAL_STATE": not torch._C._is_any_autocast_enabled(),
        # Hooks for tensors that autograd saves: see dynamo's AUTOGRAD_SAVED_TENSORS_HOOKS.
        "LAMBDA_GUARD": not torch.is_grad_enabled() and "top_saved_tensors_hooks" in " ".join(_texts(guard)),
    }
    return None if told.get(kind, False) else (guard, ({},), True)


def _texts(guard: Any) -> list[str]:
    return list(guard.verbose_code_parts())


def _is_default(stance: Any) -> bool:
    return stance.stance == "default" and not stance.skip_guard_eval_unsafe and stance.backend is None
