"""Everything this room takes from torch that torch does not promise to keep. Checked on 2.11 and 2.13.

A torch upgrade is a walk through this file. Each function says what it relies on and what it returns when that is gone:
what only informs (frames, guard failures, generated code) degrades to "unknown", what compiles raises.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
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


def is_static_input(example: object) -> bool:
    """Whether Dynamo knows this tensor as a parameter, a buffer or an address that the user marked static."""
    return getattr(example, "_dynamo_static_input_type", None) is not None


def marked_dims(example: object) -> list[int]:
    """The dims of a tensor that ``mark_dynamic`` or ``mark_unbacked`` marked, in order; not those of ``maybe_``."""
    marks = [getattr(example, name, ()) for name in ("_dynamo_dynamic_indices", "_dynamo_unbacked_indices")]
    return sorted(set().union(*marks))


def symbol_expression(value: object) -> Any:
    """The sympy expression behind a SymInt, SymFloat or SymBool; ``None`` for anything else."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value.node.expr
    return None


def storage_id(tensor: torch.Tensor) -> int:
    """Identity of the storage, also of a fake tensor's; equal for tensors that alias."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except NotImplementedError:  # inside vmap a tensor shows no storage; negative, since it is no storage's address
        return -id(tensor)


def is_wrapper_subclass(tensor: torch.Tensor) -> bool:
    """Whether a tensor is made of inner tensors (``__tensor_flatten__``)."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    return bool(is_traceable_wrapper_subclass(tensor))


def fake_mode_of(values: Sequence[object]) -> Any:
    """The mode of the first fake tensor among ``values``, ``None`` without one.

    Not the tracing context's: Dynamo gives a backend a context with a fresh mode, while the values in its graph still
    belong to the mode of the trace. Both share one shape environment.
    """
    from torch._subclasses.fake_tensor import FakeTensor

    return next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)


@contextlib.contextmanager
def real_tensors_allowed(fake_mode: Any) -> Iterator[None]:
    """Within it, operations of a ``FakeTensorMode`` take real tensors too, for their shapes."""
    before = fake_mode.allow_non_fake_inputs
    fake_mode.allow_non_fake_inputs = True
    try:
        yield
    finally:
        fake_mode.allow_non_fake_inputs = before


@contextlib.contextmanager
def as_dynamo_traces(fake_mode: Any) -> Iterator[None]:
    """Run operators on fake tensors as a trace does (Python decompositions first), without adding guards to it."""
    from torch._dispatch.python import enable_python_dispatcher

    shape_env = getattr(fake_mode, "shape_env", None)
    unguarded = shape_env.suppress_guards() if shape_env is not None else contextlib.nullcontext()
    with fake_mode or contextlib.nullcontext(), unguarded, enable_python_dispatcher():
        yield


def shape_guards(fake_mode: Any) -> list[Any]:
    """The sympy expressions of all guards that the shape environment holds now."""
    shape_env = getattr(fake_mode, "shape_env", None)
    return [guard.expr for guard in shape_env.guards] if shape_env is not None else []


def add_shape_guard(fake_mode: Any, expression: Any) -> bool:
    """Evaluate a guard at the current sizes and make Dynamo check it on every call. Returns whether it holds now."""
    return bool(fake_mode.shape_env.evaluate_expr(expression))


def symbol_ranges(fake_mode: Any, symbols: Sequence[Any]) -> tuple[str, ...]:
    """The value range of each symbol, as text: part of what a compiled piece was specialised to."""
    shape_env = getattr(fake_mode, "shape_env", None)
    ranges = getattr(shape_env, "var_to_range", {})
    return tuple(str(ranges.get(symbol, "")) for symbol in symbols)


def is_unbacked(symbol: Any) -> bool:
    """Whether a symbol has no example value (``mark_unbacked``, data-dependent sizes)."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    return bool(free_unbacked_symbols(symbol))


def size_hint(size: int | torch.SymInt) -> int:
    """An example value for a size: what the first call had, 64 where the symbol has no example."""
    expression = symbol_expression(size)
    if expression is None or isinstance(size, int):
        return int(size)
    hints = dict.fromkeys(expression.free_symbols, 64)
    shape_env = size.node.shape_env
    backed = getattr(shape_env, "backed_var_to_val", None) or getattr(shape_env, "var_to_val", {})
    hints.update({s: v for s, v in backed.items() if s in hints})
    return int(expression.subs(hints))


def resolve_op_overload(target: Any) -> Any:
    """``torch.ops.ns.op`` with a single overload is that overload: one attribute chain and one lookup less per call."""
    if isinstance(target, torch._ops.OpOverloadPacket):
        overloads = target.overloads()
        if len(overloads) == 1:
            return getattr(target, overloads[0])
    return target


def argument_names(name: str) -> list[str]:
    """The names of the arguments of ``"ns::op"``, over all its overloads; empty for an op that torch does not know yet.

    Schemas as they are registered (``torch._C._jit_get_schemas_for_operator``); looking at ``torch.ops.ns.op`` instead
    would raise for an op that is registered later.
    """
    found = torch._C._jit_get_schemas_for_operator(name)
    return list(dict.fromkeys(argument.name for schema in found for argument in schema.arguments))


def schemas_of(target: Any) -> list[Any]:
    """The schemas that a call of an operator may use: its own for an overload, those of all overloads for a packet."""
    if isinstance(target, torch._ops.OpOverload):
        return [target._schema]
    if isinstance(target, torch._ops.OpOverloadPacket):
        return [getattr(target, overload)._schema for overload in target.overloads()]
    return []


def triton_kernel_name(node: fx.Node) -> str | None:
    """The name of the user's Triton kernel that a node launches, ``None`` for any other node."""
    if getattr(node.target, "_name", "") not in ("triton_kernel_wrapper_mutation", "triton_kernel_wrapper_functional"):
        return None
    index: Any = node.kwargs.get("kernel_idx")
    try:
        from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

        kernel: Any = kernel_side_table.get_kernel(index)
        return f"triton kernel {getattr(kernel, '__name__', None) or kernel.fn.__name__}"
    except (ImportError, AttributeError, AssertionError, KeyError):
        return f"triton kernel {index}"


def is_plain_tensor(tensor: torch.Tensor) -> bool:
    """Whether a fake tensor stands for a plain tensor, not for a subclass with an own dispatch."""
    from torch._subclasses.fake_tensor import FakeTensor

    return type(tensor) in (FakeTensor, torch.Tensor, torch.nn.Parameter)


def custom_op_kernel(op: Any, device_type: str) -> tuple[Callable[..., Any], Any] | None:
    """The Python function that a ``torch.library.custom_op`` runs on a device type.

    Returns:
        The function and a container that is true while the user has switched the kernel off; ``None`` for any other op,
        and where torch keeps its custom ops in another way than on the versions named above.
    """
    try:
        from torch._library.custom_ops import OPDEFS

        definition = OPDEFS.get(op._schema.name)
        if definition is None or definition._opoverload is not op:
            return None
        kernels = definition._backend_fns
        wrapped = kernels.get(device_type) or kernels[None]
        inner = getattr(wrapped, "__wrapped__", wrapped)
        cells = dict(zip(inner.__code__.co_freevars, inner.__closure__ or (), strict=True))
        return cells["fn"].cell_contents, definition._disabled_kernel
    except (ImportError, AttributeError, KeyError, ValueError):
        return None


def call_is_watched(device_type: str) -> bool:
    """Whether something would see a call that goes through the dispatcher, and miss one that does not."""
    return bool(
        torch.is_grad_enabled()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch.is_autocast_enabled(device_type)
        or torch._C._functorch.maybe_current_level() is not None
        or torch._C._autograd._profiler_enabled()
    )


# -- Inductor ---------------------------------------------------------------------------------------------------------


def inductor_with_autograd(gm: fx.GraphModule, example_inputs: Sequence[Any], patches: dict[str, Any]) -> Any:
    """Compile as ``backend="inductor"`` does, joint graph and backward included."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(gm, list(example_inputs), config_patches=patches)


def standalone_compile(gm: fx.GraphModule, inputs: Sequence[Any], *, fake_mode: Any, patches: dict[str, Any]) -> Any:
    """One piece through Inductor.

    Args:
        gm: the piece.
        inputs: fake tensors and SymInts of ``fake_mode``; with ``fake_mode=None`` real tensors and ints, whose sizes
            the
            result is specialised to.
        fake_mode: the mode whose symbols the result keeps.
        patches: Inductor settings.
    """
    from torch._guards import TracingContext, tracing
    from torch._inductor import standalone_compile as compile_piece

    shapes: Any = "from_tracing_context" if fake_mode is not None else "from_example_inputs"
    context = tracing(TracingContext(fake_mode)) if fake_mode is not None else contextlib.nullcontext()
    with context:
        return compile_piece(gm, list(inputs), dynamic_shapes=shapes, options={"config_patches": patches})


def artifact_bytes(artifact: Any) -> bytes | None:
    """The bytes of a compiled artifact, ``None`` when Inductor says that it cannot be saved."""
    if not getattr(artifact, "is_saveable", lambda: False)():
        return None
    with tempfile.TemporaryDirectory(prefix="graphcap-") as folder:
        path = Path(folder) / "artifact"
        artifact.save(path=str(path), format="binary")
        return path.read_bytes()


def load_artifact(payload: bytes) -> Callable[..., Any]:
    """The callable of :func:`artifact_bytes`' payload. Unpickles: give it only bytes that the store trusts."""
    from torch._inductor.standalone_compile import CompiledArtifact

    with tempfile.TemporaryDirectory(prefix="graphcap-") as folder:
        path = Path(folder) / "artifact"
        path.write_bytes(payload)
        loaded: Callable[..., Any] = CompiledArtifact.load(path=str(path), format="binary")
        return loaded


@contextlib.contextmanager
def inductor_scratch(folder: Path | None) -> Iterator[None]:
    """Let Inductor and Triton write their kernels below ``folder`` while this block runs.

    ``None``, or a directory that the user chose in the environment, changes nothing. Inductor itself writes its default
    into the environment on first use, which is nobody's choice.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    before = {name: os.environ.get(name) for name in names}
    chosen = before[names[0]] not in (None, default_cache_dir())
    if folder is None or chosen:
        yield
        return
    os.environ[names[0]] = str(folder)
    if (before[names[1]] or "").startswith(default_cache_dir()):
        del os.environ[names[1]]
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


class OutputCode:
    """Collects the Python that Inductor generated or loaded inside a ``with`` block (``PyCodeCache.modules``)."""

    def __enter__(self) -> OutputCode:
        self._before = len(self._modules())
        return self

    def __exit__(self, *exc: object) -> None:
        texts = []
        for module in self._modules()[self._before :]:
            with contextlib.suppress(OSError, TypeError):
                texts.append(Path(module.__file__).read_text())
        self.text = "\n".join(texts)

    @staticmethod
    def _modules() -> list[Any]:
        try:
            from torch._inductor.codecache import PyCodeCache

            return list(PyCodeCache.modules)
        except (ImportError, AttributeError):
            return []


def codegen_config() -> dict[str, str]:
    """The Inductor and functorch settings that reach generated code, by torch's own list of what does not."""
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor

    portable = {}
    for name, module in (("inductor", inductor), ("functorch", functorch)):
        for key, value in module.save_config_portable().items():
            if not callable(value):
                portable[f"{name}.{key}"] = repr(value)
    return portable


def trace_artifact(name: str, text: Callable[[], str]) -> None:
    """Hand a text to ``TORCH_TRACE`` so that tlparse shows it beside Dynamo's own. Not made when nobody is tracing."""
    from torch._logging._internal import trace_structured

    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=text)


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


# -- recording without Dynamo -----------------------------------------------------------------------------------------


def operators_are_watched() -> bool:
    """Whether somebody else sees or changes the operators of this thread: a dispatch mode, a functorch transform."""
    return bool(torch._C._len_torch_dispatch_stack() or torch._C._functorch.maybe_current_level() is not None)


def default_device() -> torch.device | None:
    """What ``torch.set_default_device`` or ``with torch.device(...)`` chose, ``None`` for neither: both are modes."""
    return torch.get_default_device() if torch._C._len_torch_function_stack() else None


def tree_flatten(tree: Any) -> tuple[list[Any], Any]:
    """The leaves of nested containers and their structure (``torch.utils._pytree``); structures compare and hash."""
    from torch.utils import _pytree as pytree

    return pytree.tree_flatten(tree)


def tree_unflatten(leaves: Sequence[Any], spec: Any) -> Any:
    """The inverse of :func:`tree_flatten`."""
    from torch.utils import _pytree as pytree

    return pytree.tree_unflatten(leaves, spec)


def tree_leaf_names(tree: Any) -> list[str]:
    """Where each leaf of a tree lies: ``"[0].ids"``."""
    from torch.utils import _pytree as pytree

    return [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(tree)[0]]


def weak_storage(tensor: torch.Tensor) -> Callable[[], bool]:
    """A function that says whether the storage is gone; while it lives, no other storage has this one's identity."""
    from torch.multiprocessing.reductions import StorageWeakRef

    expired: Callable[[], bool] = StorageWeakRef(tensor.untyped_storage()).expired
    return expired
