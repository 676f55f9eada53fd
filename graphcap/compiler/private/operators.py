"""Operators: overloads, schemas, Python kernels, and who watches their calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from typing import Any

import torch
from torch import fx

_UNKNOWN_SIZE = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}


def resolve_op_overload(target: Any) -> Any:
    """``torch.ops.ns.op`` with a single overload is that overload: one attribute chain and one lookup less per call."""
    if isinstance(target, torch._ops.OpOverloadPacket):
        overloads = target.overloads()
        if len(overloads) == 1:
            return getattr(target, overloads[0])
    return target


def operator_names() -> frozenset[str]:
    """Every operator that is registered now, with and without the names of overloads; empty where torch does not tell.

    ``torch._C._dispatch_get_all_op_names`` has ``"aten::add.Tensor"``; higher-order ones are in a table of their own.
    """
    try:
        plain = torch._C._dispatch_get_all_op_names()
        higher = torch._ops._higher_order_ops
    except AttributeError:
        return frozenset()
    packets = (name.partition(".")[0] for name in plain)
    return frozenset((*plain, *packets, *(f"higher_order::{name}" for name in higher)))


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
    return [overload._schema for overload in _overloads(target)]


def out_overload(target: Any, given: Set[str]) -> tuple[Any, str] | None:
    """The overload that differs only in the tensor that it writes its result to, and the name of that argument.

    Args:
        target: an overload, or a packet where the overload beside those with ``out`` is meant.
        given: the names of the keyword arguments of a call.

    Returns:
        ``None`` where there is none, or ``target`` makes anything but one new tensor whose size follows from its
        arguments' sizes.
    """
    overloads = _overloads(getattr(target, "overloadpacket", target))
    written = {op: [a for a in op._schema.arguments if a.alias_info and a.alias_info.is_write] for op in overloads}
    into = {op: args[0].name for op, args in written.items() if len(args) == 1 and args[0].kwarg_only}
    if isinstance(target, torch._ops.OpOverloadPacket):
        others = [op for op in overloads if op not in into and not set(into.values()) & given]
        target = others[0] if len(others) == 1 else None
    if target not in overloads or target in into or _UNKNOWN_SIZE & set(target.tags) or not _makes_a_tensor(target):
        return None
    wanted = _named(target._schema.arguments)
    for op, name in into.items():
        if _named(each for each in op._schema.arguments if each.name != name) == wanted:
            return op, name
    return None


def _overloads(target: Any) -> list[Any]:
    if not isinstance(target, torch._ops.OpOverloadPacket):
        return []
    return [getattr(target, name) for name in target.overloads()]


def _makes_a_tensor(op: Any) -> bool:
    """Whether it returns one, and neither returns nor writes an argument."""
    values = [*op._schema.arguments, *op._schema.returns]
    is_new = all(each.alias_info is None for each in values)
    return is_new and [str(each.type) for each in op._schema.returns] == ["Tensor"]


def _named(arguments: Iterable[Any]) -> list[tuple[str, str]]:
    return [(each.name, str(each.type)) for each in arguments]


def returns_tensors_and_sizes(target: Any) -> bool:
    """Whether an aten operator returns tensors and numbers of which its schema says that they follow from sizes alone.

    Kernels of attention do: the longest query and key.
    """
    kinds = {each.real_type.kind() for schema in schemas_of(target) for each in schema.returns}
    return kinds == {"TensorType", "SymIntType"} and target.namespace == "aten"


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


def operators_are_watched() -> bool:
    """Whether somebody else sees or changes the operators of this thread: a dispatch mode, a functorch transform."""
    return bool(torch._C._len_torch_dispatch_stack() or torch._C._functorch.maybe_current_level() is not None)
