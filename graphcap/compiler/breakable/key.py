"""Which calls are alike: those with one structure of arguments, equal numbers and strings, tensors of one layout.

Sizes that follow declared dims are no part of it: calls of all sizes are alike.

An argument that is neither a tensor nor a plain value (a cache object, a module) is known by identity. What it holds is
watched by :mod:`~graphcap.compiler.breakable.state`.
"""

from __future__ import annotations

import enum
import weakref
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from graphcap.compiler import private
from graphcap.compiler.breakable.sizes import CallSizes, SizedLayout, layout_key, sized_layout

#: Compared by value. A bool is no int and 0.0 is not -0.0: types and signs are part of the key.
PLAIN = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    enum.Enum,
)

_NEVER_CONTAINERS = (torch.Tensor, *PLAIN)


@dataclass(frozen=True, slots=True)
class Arguments:
    """The arguments of one call, flat.

    Attributes:
        key: equal for calls that one recording may serve, as far as arguments and the state of torch tell.
        leaves: every leaf of ``(args, kwargs)``, in the order of the tree, then the inputs of the step.
        tensors: those that are tensors; one object that occurs twice is listed once.
        sizes: the declared ones.
    """

    key: Hashable
    leaves: list[Any]
    tensors: list[torch.Tensor]
    sizes: CallSizes

    def layouts(self) -> list[SizedLayout]:
        """Of each tensor."""
        return [sized_layout(tensor, self.sizes.dims.get(id(tensor), {})) for tensor in self.tensors]

    def opaque(self) -> list[Any]:
        """The leaves that are neither tensors nor plain."""
        return [leaf for leaf in self.leaves if not isinstance(leaf, torch.Tensor) and not isinstance(leaf, PLAIN)]

    def tensor_names(self, names: Sequence[str]) -> list[str]:
        """The names of :attr:`tensors`, given those of the leaves."""
        found: dict[int, str] = {}
        for leaf, name in zip(self.leaves, names, strict=True):
            if isinstance(leaf, torch.Tensor):
                found.setdefault(id(leaf), name)
        return list(found.values())

    def reason_to_refuse(self) -> str:
        """Why no recording can serve such a call, ``""`` where one may."""
        for tensor in self.tensors:
            if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
                return f"an argument is a {type(tensor).__name__} with layout {tensor.layout}"
        for leaf in self.opaque():
            if type(leaf).__module__.partition(".")[0] == "numpy":
                return "an argument is a numpy array, whose values no operator reads: pass a tensor"
            if not hasattr(leaf, "__dict__") or not _can_be_watched(leaf):
                return f"an argument is a {type(leaf).__name__}, which can neither be compared nor watched"
        return ""


def arguments_of(
    args: tuple[Any, ...], kwargs: dict[str, Any], step_inputs: Mapping[str, Any], sizes: CallSizes
) -> Arguments:
    """Flatten the arguments of a call.

    Args:
        args: positional arguments.
        kwargs: keyword arguments.
        step_inputs: the inputs of the step that the model reads.
        sizes: the declared sizes of the call.
    """
    leaves, structure = _flatten(args, kwargs)
    if step_inputs:
        leaves = [*leaves, *step_inputs.values()]
    tensors: dict[int, torch.Tensor] = {}
    numbers: dict[int, int] = {}
    keys: list[Hashable] = []
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            number = numbers.setdefault(id(leaf), len(numbers))
            tensors[number] = leaf
            dims = sizes.dims.get(id(leaf))
            layout = layout_of(leaf) if dims is None else layout_key(leaf, dims)
            keys.append((number, type(leaf), layout, leaf.requires_grad))
        elif isinstance(leaf, PLAIN):
            keys.append(plain_key(leaf))
        else:
            keys.append((type(leaf), id(leaf)))
    key = structure, tuple(step_inputs), tuple(keys), tuple(sizes.values), torch_state()
    return Arguments(key, leaves, list(tensors.values()), sizes)


def _flatten(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Hashable]:
    """The leaves of a call in the order of the tree, and its structure."""
    leaves = [*args, *kwargs.values()]
    if all(isinstance(leaf, _NEVER_CONTAINERS) for leaf in leaves):  # a tenth of what the tree costs
        return leaves, (len(args), *kwargs)
    leaves, spec = private.tree_flatten((args, kwargs))
    try:
        hash(spec)
    except TypeError:  # a registered container may describe itself by what cannot be hashed
        return leaves, repr(spec)
    return leaves, cast(Hashable, spec)


def _can_be_watched(leaf: Any) -> bool:
    try:
        weakref.ref(leaf)
    except TypeError:
        return False
    return True


def plain_key(value: Any) -> Hashable:
    """A plain value such that equal keys mean the same to every operator."""
    return (type(value), repr(value)) if isinstance(value, (float, complex)) else (type(value), value)


def layout_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What a recorded operator relies on: size, stride, dtype, device, and whether it shows its memory negated or
    conjugated."""
    stride = tensor.stride() if tensor.layout is torch.strided else None
    dtype = tensor.dtype
    return tensor.size(), stride, dtype, tensor.device, tensor.is_neg(), dtype.is_complex and tensor.is_conj()


def torch_state() -> Hashable:
    """The switches of torch that change which operators a function runs."""
    modes = [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()]
    modes.append(private.default_device())
    for device in ("cpu", "cuda"):
        on = torch.is_autocast_enabled(device)
        modes.append(torch.get_autocast_dtype(device) if on else None)
    return (*modes, torch.are_deterministic_algorithms_enabled())


def same_leaf(a: Any, b: Any) -> bool:
    """Whether two arguments of an operator that are no tensors are the same to it."""
    if a is b:
        return True
    if isinstance(a, PLAIN) and isinstance(b, PLAIN):
        return plain_key(a) == plain_key(b)
    return type(a) is type(b) and isinstance(a, (slice, range, torch.Size)) and a == b
