"""Which operations end a piece, and which of those may be captured.

Two questions are kept apart. A *split rule* says where pieces end. The *capture rule* says whether the operation
itself may live inside a CUDA graph: functional ones whose shapes the key fixes (SDPA, flex_attention) may, in FULL;
an opaque custom op may read Python state or CPU metadata, so it runs live until :func:`register_op` declares
otherwise (default-deny).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import fx

from graphcap.compiler import private
from graphcap.cudagraph import Capture
from graphcap.errors import ConfigError, did_you_mean

#: Attention in the spellings that models use. ``"ns::*"`` names every op of a namespace.
DEFAULT_SPLITTING_OPS: tuple[str, ...] = (
    "aten::scaled_dot_product_attention",
    "aten::_scaled_dot_product_attention_math",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "aten::_flash_attention_forward",
    "aten::_efficient_attention_forward",
    "higher_order::flex_attention",
    "torch_attn::*",
    "flash_attn::*",
    "flash_attn_2::*",
    "flash_attn_3::*",
    "xformers_flash::*",
    "xformers::*",
    "flashinfer::*",
    "vllm::unified_attention",
    "vllm::unified_attention_with_output",
    "vllm::unified_mla_attention",
    "vllm::unified_mla_attention_with_output",
    "sgl_kernel::*",
)

#: Namespaces whose ops are functions of their tensor arguments alone, so that a CUDA graph may hold them.
CAPTURABLE_NAMESPACES = frozenset(
    {
        *("aten", "prims", "prim", "higher_order", "inductor", "_c10d_functional", "graphcap"),
        *("rngprims", "quantized_decomposed"),
    }
)

#: Third-party attention that is functional: shapes and values follow from its tensor arguments.
CAPTURABLE_OPS = frozenset({"flash_attn::_flash_attn_forward", "torch_attn::_varlen_attn"})

#: aten ops that hand a value to the host or whose output size is data: a capture cannot hold them.
HOST_SYNC_OPS = frozenset(
    {
        *("item", "tolist", "nonzero", "masked_select", "unique", "unique_consecutive", "bincount", "numpy", "cpu"),
        *("_local_scalar_dense", "argwhere", "is_nonzero", "__bool__", "equal", "allclose"),
    }
)

_PYTHON_SPELLINGS: dict[Any, str] = {
    torch._C._nn.scaled_dot_product_attention: "aten::scaled_dot_product_attention",
    torch.nn.functional.scaled_dot_product_attention: "aten::scaled_dot_product_attention",
}

CapturePolicy = Literal["always", "uniform_batch", "uniform_single_token", "never"]


@dataclass(frozen=True)
class Declared:
    """What :func:`register_op` was told about an op.

    Attributes:
        capture: when a CUDA graph may hold it.
        out_args: the arguments that it writes its results into.
    """

    capture: CapturePolicy
    out_args: tuple[str, ...] = ()

    @property
    def reason(self) -> str:
        """The declaration as part of a sentence."""
        return f"registered with capture={self.capture!r}"


_declared: dict[str, Declared] = {}
_lock = threading.Lock()


def register_op(op: str | Any, *, capture: CapturePolicy, out_args: Sequence[str] = ()) -> None:
    """Declare whether a custom op may be captured into a CUDA graph.

    A declaration is believed and then checked: the first replay on other inputs than those of the capture is compared
    with a live run, and where they differ the op runs live from then on, with an error in the log. Declare ops before
    the first call of models that use them: what is compiled keeps what it was told, until ``graphcap.reset()``.

    Args:
        op: ``"ns::name"``, an ``OpOverload``, an ``OpOverloadPacket`` or what ``torch.library.custom_op`` returned.
        capture: ``"always"``: the op is a function of its tensor arguments and launches work on the current stream
            only;
            ``"uniform_batch"``: that holds where every request of the batch brings the same number of tokens; it is
            captured in FULL graphs of such batches and runs live elsewhere;
            ``"uniform_single_token"``: the same, where every request brings one token;
            ``"never"``: it runs live on every call.
        out_args: names of the arguments that the op writes its results into. What its schema marks as written
            (``Tensor(a!)``, ``mutates_args=``) is known and need not be named.

    Raises:
        ConfigError: for another value of ``capture``, something that names no op, or an argument that the op does not
            have.
    """
    if capture not in get_args(CapturePolicy):
        valid = ", ".join(map(repr, get_args(CapturePolicy)))
        raise ConfigError(f"register_op: capture={capture!r} is not known; valid are: {valid}")
    if isinstance(out_args, str) or not all(isinstance(name, str) for name in out_args):
        raise ConfigError(f"register_op: out_args takes a sequence of argument names, got {out_args!r}")
    name = _registered_name(op)
    known = private.argument_names(name)
    for argument in out_args:
        if known and argument not in known:
            raise ConfigError(f"register_op: {name} has no argument {argument!r}; {did_you_mean(argument, known)}")
    with _lock:
        _declared[name] = Declared(capture, tuple(out_args))


def declared(target: Any) -> Declared | None:
    """What was declared about the op that a node calls, ``None`` where nothing was."""
    return _declared.get(op_name(target)) if _declared else None


def _registered_name(op: str | Any) -> str:
    if isinstance(op, str) and op.count("::") == 1:
        return op
    name = op_name(getattr(op, "_opoverload", op)) if not isinstance(op, str) else ""
    if "::" not in name:
        raise ConfigError(f"register_op: {op!r} names no operator; give 'namespace::name' or the op itself")
    return name


def op_name(target: Any) -> str:
    """The qualified name that rules match: ``"aten::mm"``, ``"higher_order::flex_attention"``, ``"pkg.mod.fn"``."""
    if isinstance(target, str):
        return f"aten::{target}"  # a method call: Tensor.transpose is aten's
    if target in _PYTHON_SPELLINGS:
        return _PYTHON_SPELLINGS[target]
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name
    if isinstance(target, torch._ops.OpOverloadPacket):
        return str(target._qualified_op_name)
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"higher_order::{target.name()}"
    module = getattr(target, "__module__", None) or ""
    return f"{module}.{getattr(target, '__qualname__', getattr(target, '__name__', repr(target)))}"


@dataclass(frozen=True)
class SplitRules:
    """What ends a piece: op names, ``@graphcap.eager`` functions, ``cudagraph_unsafe`` ops and the user's own
    predicates.

    Attributes:
        names: ``"ns::op"``, ``"ns::op.overload"`` or ``"ns::*"``; a plain ``"pkg.mod.function"`` works too.
        predicates: called with each node; true means that the node is cut out.
    """

    names: tuple[str, ...]
    predicates: tuple[Callable[[fx.Node], bool], ...] = ()

    @classmethod
    def of(cls, names: Sequence[str] | None, predicates: Sequence[Callable[[fx.Node], bool]]) -> SplitRules:
        """The rules of a config: ``None`` stands for :data:`DEFAULT_SPLITTING_OPS`."""
        return cls(DEFAULT_SPLITTING_OPS if names is None else tuple(names), tuple(predicates))

    def match(self, node: fx.Node) -> str | None:
        """Why this node ends a piece, or ``None``."""
        if (named := self.match_name(node.target)) is not None:
            return named
        for predicate in self.predicates:
            if predicate(node):
                return f"user rule {getattr(predicate, '__name__', 'predicate')}"
        return None

    def match_name(self, target: Any) -> str | None:
        """Why a call of this function ends a piece, whatever its arguments are, or ``None``."""
        name = op_name(target)
        overload = getattr(target, "_overloadname", "")
        spellings = (name, f"{name}.{overload}", _aten_spelling(target))
        for rule in self.names:
            if rule in spellings or (rule.endswith("::*") and name.startswith(rule[:-1])):
                return f"splitting op {name}"
        return None


def never_captured(node: fx.Node) -> str | None:
    """Why a CUDA graph may not hold this operation, or ``None`` when it may."""
    return target_never_captured(node.target)


def target_never_captured(target: Any) -> str | None:
    """Why a CUDA graph may not hold a call of this function or operator, or ``None`` when it may."""
    name = op_name(target)
    if hasattr(target, "_graphcap_eager"):
        return f"@graphcap.eager function {name}"
    known = declared(target)
    if known is not None:
        return f"{name} is {known.reason}" if known.capture == "never" else None
    if torch.Tag.cudagraph_unsafe in getattr(private.resolve_op_overload(target), "tags", ()):
        return f"{name} is tagged cudagraph_unsafe"
    namespace, _, plain = name.rpartition("::")
    if (plain or name).rpartition(".")[2] in HOST_SYNC_OPS:
        return f"{name} hands data to the host"
    if not namespace or namespace in CAPTURABLE_NAMESPACES or name in CAPTURABLE_OPS:
        return None if _is_torch_function(target) else f"{name} is a Python function that torch does not know"
    return f"{name} is an opaque custom op; graphcap.register_op({name!r}, capture='always') declares it capturable"


#: In which batches an op that may be captured under a condition is captured.
_CONDITIONS = {"uniform_batch": Capture.UNIFORM, "uniform_single_token": Capture.UNIFORM_SINGLE}


def captured_when(node: fx.Node) -> tuple[Capture, str] | None:
    """The condition under which an op may be captured, and why; ``None`` for one without a condition."""
    known = declared(node.target)
    if known is None or known.capture not in _CONDITIONS:
        return None
    return _CONDITIONS[known.capture], f"{op_name(node.target)} is {known.reason}"


def unproven(node: fx.Node) -> str | None:
    """The name of an op that is captured on somebody's word: declared, or a Triton kernel; ``None`` for all others.

    Such an op may bake into a graph what it read in Python; the graph runtime compares its first replay with a live
    run.
    """
    known = declared(node.target)
    if known is not None:
        return op_name(node.target) if known.capture != "never" else None
    return private.triton_kernel_name(node)


def undeclared_writes(node: fx.Node) -> tuple[str, ...]:
    """The ``out_args`` of an op that its schema does not mark as written: torch must not get to compile it."""
    known = declared(node.target)
    if known is None or not known.out_args:
        return ()
    silent = {
        argument.name
        for schema in private.schemas_of(node.target)
        for argument in schema.arguments
        if argument.alias_info is None or not argument.alias_info.is_write
    }
    return tuple(name for name in known.out_args if name in silent)


def _aten_spelling(target: Any) -> str:
    """``"aten::softmax"`` for ``torch.softmax`` and ``F.softmax``, ``"aten::matmul"`` for ``@``; ``""`` for others."""
    name = getattr(target, "__name__", "")
    known = callable(target) and _is_torch_function(target) and hasattr(torch.ops.aten, name)
    return f"aten::{name}" if known else ""


def _is_torch_function(target: Any) -> bool:
    """Builtins, ``operator`` and ``torch.*`` functions; an ``allow_in_graph`` function of somebody else's is not."""
    if isinstance(target, (str, torch._ops.OpOverload, torch._ops.OpOverloadPacket, torch._ops.HigherOrderOperator)):
        return True
    module = getattr(target, "__module__", None) or ""
    root = module.partition(".")[0]
    return root in ("torch", "_operator", "operator", "builtins", "math", "")
