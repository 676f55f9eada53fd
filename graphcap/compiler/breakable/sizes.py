"""The sizes of one call: which dims of its tensors were declared, what they follow, and how tensors are laid out then.

A symbol is the name that the user gave to a dim (of ``"num_reqs+1"`` that is ``"num_reqs"``). Calls that differ in the
values of symbols alone have one key.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from graphcap.compiler.frontend.call_dims import CallDims
from graphcap.compiler.frontend.dims import DynamicDim
from graphcap.cudagraph import DimSize, Size
from graphcap.cudagraph.dispatch.metadata import PREFIX


@dataclass(frozen=True, slots=True)
class CallSizes:
    """The declared sizes of one call.

    Attributes:
        values: per symbol its value, in the order in which dims were declared.
        dims: per tensor (by ``id``) what each declared dim follows.
    """

    values: Mapping[str, int] = field(default_factory=dict)
    dims: Mapping[int, Mapping[int, Size]] = field(default_factory=dict)


def sizes_of(
    declared: CallDims, args: tuple[Any, ...], kwargs: dict[str, Any], step_inputs: Mapping[str, Any]
) -> CallSizes:
    """Read the sizes of a call. Where a dim has no whole number for its symbol, none of them count as declared.

    Args:
        declared: the dims; inferred ones are not meant to be padded.
        args: positional arguments.
        kwargs: keyword arguments.
        step_inputs: the inputs of the step that the model reads.

    Raises:
        DimError: a tensor has too few dims.
    """
    if declared.inferred or not (declared.dims or declared.step_dims):
        return CallSizes()
    values: dict[str, int] = {}
    dims: dict[int, dict[int, Size]] = {}
    for tensor, dim, what in _resolved(declared, args, kwargs, step_inputs):
        followed = _followed(what)
        value = followed.symbol_at(length := tensor.shape[dim])
        if followed.at(value) != length or values.setdefault(followed.symbol, value) != value:
            return CallSizes()
        dims.setdefault(id(tensor), {})[dim] = followed
    return CallSizes(values, dims)


@functools.cache
def _followed(what: DynamicDim) -> Size:
    return Size(*(what.follows or (what.name,)))


def _resolved(
    declared: CallDims, args: tuple[Any, ...], kwargs: dict[str, Any], step_inputs: Mapping[str, Any]
) -> Iterator[tuple[torch.Tensor, int, DynamicDim]]:
    for _, tensor, dim, what in declared.resolved(args, kwargs):
        yield tensor, dim, what
    for what in declared.step_dims:
        given = step_inputs.get(what.path.removeprefix(PREFIX))
        if isinstance(given, torch.Tensor) and -given.dim() <= what.dim < given.dim():
            yield given, what.dim % given.dim(), what


@dataclass(frozen=True, slots=True)
class SizedLayout:
    """What calls of other sizes have in common in one tensor.

    Attributes:
        sizes: per dim.
        strides: per dim; ``None`` where it follows more than one symbol.
        dtype: of the elements.
        device: where it is.
    """

    sizes: tuple[DimSize, ...]
    strides: tuple[DimSize, ...] | None
    dtype: torch.dtype
    device: torch.device


def sized_layout(tensor: torch.Tensor, dims: Mapping[int, Size]) -> SizedLayout:
    """The layout of a tensor some of whose dims follow symbols. A dense one stays dense at other sizes; of any other
    the strides are taken to be the same."""
    sizes = tuple(dims.get(dim, size) for dim, size in enumerate(tensor.shape))
    strides: tuple[DimSize, ...] | None = None
    if tensor.layout is torch.strided:
        strides = _dense_strides(sizes) if tensor.is_contiguous() else tensor.stride()
    return SizedLayout(sizes, strides, tensor.dtype, tensor.device)


def layout_key(tensor: torch.Tensor, dims: Mapping[int, Size]) -> Hashable:
    """What tells one :class:`SizedLayout` from another, for less, and whether the memory is shown negated or
    conjugated."""
    sizes: list[Hashable] = list(tensor.shape)
    for dim, size in dims.items():
        sizes[dim] = size.symbol  # a name stands for one size, whatever is added to it
    strided = tensor.layout is torch.strided and (tensor.is_contiguous() or tensor.stride())
    dtype = tensor.dtype
    return tuple(sizes), strided, dtype, tensor.device, tensor.is_neg(), dtype.is_complex and tensor.is_conj()


def _dense_strides(sizes: tuple[DimSize, ...]) -> tuple[DimSize, ...]:
    strides: list[DimSize] = []
    stride: DimSize = 1
    for size in reversed(sizes):
        strides.append(stride)
        stride = _times(stride, max(1, size) if isinstance(size, int) else size)
    return tuple(reversed(strides))


def _times(a: DimSize, b: DimSize) -> DimSize:
    if isinstance(a, int) and isinstance(b, int):
        return a * b
    if isinstance(a, int) and isinstance(b, Size):
        return Size(b.symbol, a * b.scale, a * b.offset)
    if isinstance(a, Size) and isinstance(b, int):
        return Size(a.symbol, b * a.scale, b * a.offset)
    return None
