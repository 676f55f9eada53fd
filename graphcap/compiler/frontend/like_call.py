"""Inputs like those of one call, at other sizes: what a ladder is captured with when nobody makes inputs for it.

A declared tensor becomes a fresh one that holds the declared fill and nothing of the call, so that no write goes where
a real row would. Everything else is what the call was given.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import torch
from torch import nn

from graphcap.compiler.frontend.call_dims import CallDims
from graphcap.compiler.frontend.dims import DynamicDim
from graphcap.compiler.frontend.paths import leaves
from graphcap.config import Config
from graphcap.cudagraph import GraphKey, step
from graphcap.cudagraph.dispatch.metadata import PREFIX
from graphcap.cudagraph.padded.corner import Fill, declared_fill
from graphcap.errors import StepError


@dataclass
class _Declared:
    """A declared tensor of the call: where it is, and which of its dims follow which names."""

    path: str
    tensor: torch.Tensor
    dims: dict[int, DynamicDim] = field(default_factory=dict)

    def size_at(self, key: GraphKey) -> list[int]:
        """Its size in another batch; a dim whose name the key does not have stays as it is."""
        named = {"num_tokens": key.num_tokens, "num_reqs": key.num_reqs, **dict(key.sizes)}
        size = list(self.tensor.shape)
        for dim, declared in self.dims.items():
            name, factor, offset = declared.follows or (declared.name, 1, 0)
            if (base := named.get(name)) is not None:
                size[dim] = base * factor + offset
        return size


class LikeCall:
    """The arguments of a call, and what they become in other batches.

    Attributes:
        lent: the tensors that are used as the call gave them.
        tags: of the step of the call.
    """

    def __init__(
        self, dims: CallDims, config: Config, args: Sequence[Any], kwargs: Mapping[str, Any], said: step | None
    ) -> None:
        """Look at the call; ``said`` is the step in force."""
        self._args, self._kwargs = tuple(args), dict(kwargs)
        self._inputs = {} if said is None else dict(said.inputs.given)
        self.tags = () if said is None or said.key is None else said.key.tags
        self._config = config
        self._declared: dict[int, _Declared] = {}
        for path, tensor, dim, declared in dims.resolved(self._args, self._kwargs):
            self._declared.setdefault(id(tensor), _Declared(path, tensor)).dims[dim] = declared
        for each in dims.step_dims:
            given = self._inputs.get(each.path.removeprefix(PREFIX))
            if isinstance(given, torch.Tensor) and -given.dim() <= each.dim < given.dim():
                found = self._declared.setdefault(id(given), _Declared(each.path, given))
                found.dims[each.dim % given.dim()] = each
        tensors = [tensor for _, tensor in leaves("", (self._args, self._kwargs))]
        self.lent = [tensor for tensor in tensors if id(tensor) not in self._declared]

    def at(self, key: GraphKey) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:
        """Arguments, keyword arguments and step inputs for a batch.

        Raises:
            StepError: a declared tensor cannot be made in another size.
            Exception: what a fill of the user's raises.
        """
        fresh = {number: self._at(each, key) for number, each in self._declared.items()}
        args = tuple(_with(value, fresh) for value in self._args)
        kwargs = {name: _with(value, fresh) for name, value in self._kwargs.items()}
        return args, kwargs, {name: _with(value, fresh) for name, value in self._inputs.items()}

    def _at(self, declared: _Declared, key: GraphKey) -> torch.Tensor:
        tensor, size = declared.tensor, declared.size_at(key)
        if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided:
            raise StepError(
                f"{declared.path} is a {type(tensor).__name__} with layout {tensor.layout}: give make_inputs"
            )
        if declared.path in self._config.static_args:
            raise StepError(f"{declared.path} is a static argument, whose memory is the caller's: give make_inputs")
        # Dynamo tells tensors that were made in inference mode from others.
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            fresh = torch.empty_strided(size, _strides_like(tensor, size), dtype=tensor.dtype, device=tensor.device)
            _fill(fresh, declared, declared_fill(self._config.pad, declared.path))
        return fresh.requires_grad_(tensor.requires_grad)


def _fill(fresh: torch.Tensor, declared: _Declared, fill: Fill | None) -> None:
    """The declared fill in every element, as if no row were a real one."""
    if isinstance(fill, (bool, int, float)):
        fresh.fill_(fill)
        return
    fresh.zero_()
    if callable(fill):
        fill(fresh, torch.Size(0 if dim in declared.dims else size for dim, size in enumerate(fresh.shape)))
    elif fill is not None and declared.tensor.numel():
        first = declared.tensor.detach()
        for dim in declared.dims:
            first = first.narrow(dim, 0, 1)
        fresh.copy_(first.expand_as(fresh))


def _strides_like(tensor: torch.Tensor, size: Sequence[int]) -> list[int]:
    """Of a dense tensor of this size whose dims lie in memory in the order of another one's."""
    strides, stride = [0] * len(size), 1
    for dim in sorted(range(len(size)), key=lambda dim: (tensor.stride(dim), -dim)):
        strides[dim] = stride
        stride *= max(1, size[dim])
    return strides


def _with(value: Any, fresh: Mapping[int, torch.Tensor]) -> Any:
    """A value whose declared tensors are replaced; the very same object where it has none."""
    if isinstance(value, torch.Tensor):
        return fresh.get(id(value), value)
    if isinstance(value, (list, tuple)):
        items = [_with(each, fresh) for each in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, Mapping):
        changed = {name: new for name, old in value.items() if (new := _with(old, fresh)) is not old}
        return _changed(value, changed, dict.__setitem__) if changed else value
    if isinstance(value, nn.Module) or not (is_dataclass(value) or hasattr(value, "__dict__")):
        return value
    names = getattr(value, "__dataclass_fields__", None) or vars(value)
    held = {name: getattr(value, name) for name in names}
    plain = {name: old for name, old in held.items() if isinstance(old, (torch.Tensor, list, tuple, Mapping))}
    changed = {name: new for name, old in plain.items() if (new := _with(old, fresh)) is not old}
    return _changed(value, changed, object.__setattr__) if changed else value


def _changed(value: Any, changed: Mapping[str, Any], put: Any) -> Any:
    """A shallow copy in which these are put."""
    twin = copy.copy(value)
    for name, new in changed.items():
        put(twin, name, new)
    return twin
