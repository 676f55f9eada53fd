"""What Dynamo tells about the function that it traces, and what it lets us hook into."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import fx


@dataclass(frozen=True)
class Frame:
    """The Python frame that Dynamo is compiling.

    Attributes:
        code: its code object, ``None`` when torch does not tell.
        owner: the ``self`` of the frame when there is one.
        compile_id: Dynamo's ``"frame/recompile"`` counter, such as ``"0/1"``.
    """

    code: CodeType | None
    owner: Any
    compile_id: str

    @property
    def function(self) -> str:
        """The qualified name of the traced function, ``"<unknown>"`` when torch does not tell."""
        return self.code.co_qualname if self.code is not None else "<unknown>"

    @property
    def location(self) -> str:
        """``file:line`` of the traced function's definition."""
        return f"{self.code.co_filename}:{self.code.co_firstlineno}" if self.code is not None else "<unknown>"


def restarts_trace(error: BaseException) -> bool:
    """Whether an exception is Dynamo's own way of saying that it has to trace again, having learned something: that a
    float must be constant, say. It is no failure, and must reach Dynamo."""
    return isinstance(error, torch._dynamo.exc.RestartAnalysis)


def current_frame() -> Frame:
    """The frame being compiled, from inside a backend call (``InstructionTranslator.current_tx``)."""
    from torch._guards import CompileContext

    compile_id = CompileContext.current_compile_id()
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        tx = InstructionTranslator.current_tx()
        return Frame(tx.f_code, dict(tx.output.local_scope).get("self"), str(compile_id or "?"))
    except (ImportError, AttributeError):
        return Frame(None, None, str(compile_id or "?"))


def latest_guard_failure(code: CodeType | None) -> str:
    """The guard of the newest graph that failed on this code, in one line (``torch._dynamo.utils.guard_failures``).

    Dynamo appends one text per graph of the code at each recompile, newest graph first: ``"0/1: ..."``, ``"0/0: ..."``.
    """
    from torch._dynamo.utils import guard_failures

    texts = [str(text) for text in guard_failures.get(code, ())] if code is not None else []
    start = len(texts) - 1
    while start > 0 and _graph_number(texts[start - 1]) > _graph_number(texts[start]):
        start -= 1
    return " ".join(texts[start].partition("\n")[0].split()) if texts else ""


def _graph_number(failure: str) -> int:
    number = failure.partition(":")[0].rpartition("/")[2]
    return int(number) if number.isdigit() else -1


def recompile_limit() -> int:
    """After how many graphs per function Dynamo gives up and runs it eager."""
    import torch._dynamo.config as config

    return int(getattr(config, "recompile_limit", getattr(config, "cache_size_limit", 8)))


def source_name(node: fx.Node) -> str:
    """Where Dynamo found a placeholder: ``"L['self']._modules['fc']._parameters['weight']"``."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    if source is None:
        return node.name
    name = source.name
    return str(name() if callable(name) else name)


def on_bytecode(hook: Callable[[CodeType, CodeType], CodeType | None]) -> None:
    """Have ``hook`` called with the user's code and what Dynamo made of it, once per compiled frame and for good.

    The hook must not raise, as Dynamo would take that for a failure of the compilation, and returns ``None``: what it
    returned would run instead.
    """
    import torch._dynamo.convert_frame as convert_frame

    register: Any = convert_frame.register_bytecode_hook  # its own type is a protocol that names the arguments
    register(hook)


def original_of(compiled: Any) -> tuple[Any, bool]:
    """What ``torch.compile`` was given (``_orig_mod``, ``_torchdynamo_orig_callable``), and whether it was compiled."""
    if isinstance(compiled, torch.nn.Module):
        original = vars(compiled)["_modules"].get("_orig_mod")
        in_place = vars(compiled).get("_compiled_call_impl") is not None
        return (original, True) if original is not None else (compiled, in_place)
    original = getattr(compiled, "_torchdynamo_orig_callable", None)
    return (original, True) if original is not None else (compiled, False)


def is_frame_of(code: CodeType | None, function: CodeType) -> bool:
    """Whether Dynamo traced ``code`` as ``function`` or as the rest of it after a graph break."""
    if code is None or code is function:
        return code is function
    resumed = code.co_name.startswith(f"torch_dynamo_resume_in_{function.co_name}_at_")
    return resumed and code.co_filename == function.co_filename


def trace_artifact(name: str, text: Callable[[], str]) -> None:
    """Hand a text to ``TORCH_TRACE`` so that tlparse shows it beside Dynamo's own. Not made when nobody is tracing."""
    from torch._logging._internal import trace_structured

    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=text)
