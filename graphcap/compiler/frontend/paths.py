"""Paths to the values of a call, ``"batch.input_ids"``, and to the inputs of its step, ``"step.seq_lens"``."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch

from graphcap.compiler.frontend.dims import DynamicDim
from graphcap.cudagraph.dispatch.metadata import PREFIX
from graphcap.cudagraph.dispatch.step import current
from graphcap.errors import DimError, did_you_mean


@dataclass(frozen=True, slots=True)
class Place:
    """Where a call holds the value of a :class:`DynamicDim`."""

    position: int  #: among the positional arguments; ``sys.maxsize`` where it is only ever passed by keyword
    keyword: str
    rest: bool  #: the value is the tuple of all positional arguments from ``position`` on
    steps: tuple[str, ...]
    dim: DynamicDim


def is_of_step(path: str, signature: inspect.Signature) -> bool:
    """Whether it names a tensor of :class:`graphcap.step`: ``"step.seq_lens"``, where no argument is called step."""
    return path.startswith(PREFIX) and "step" not in signature.parameters


def place_of(dim: DynamicDim, signature: inspect.Signature, owner: str, setting: str = "dynamic_arg_dims") -> Place:
    """Where calls with this signature hold a value.

    Args:
        dim: whose.
        signature: of the call, without ``self``.
        owner: whose signature it is, for messages.
        setting: which setting has the path, for messages.

    Raises:
        DimError: there is no parameter of that name.
    """
    root, *steps = dim.path.split(".")
    parameters = signature.parameters
    parameter = parameters.get(root)
    if parameter is not None and parameter.kind is parameter.VAR_KEYWORD and steps:
        return Place(sys.maxsize, steps[0], False, tuple(steps[1:]), dim)
    if parameter is None or parameter.kind is parameter.VAR_KEYWORD:
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return Place(sys.maxsize, root, False, tuple(steps), dim)
        raise DimError(f"{setting}: {owner} has no argument {root!r}; {did_you_mean(root, parameters)}")
    if parameter.kind is parameter.KEYWORD_ONLY:
        return Place(sys.maxsize, root, False, tuple(steps), dim)
    return Place(list(parameters).index(root), root, parameter.kind is parameter.VAR_POSITIONAL, tuple(steps), dim)


def fetch(place: Place, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a call holds there; ``None`` where it leaves the argument out.

    Raises:
        DimError: the path leads through a value that has no such field.
    """
    if place.rest:
        value: Any = args[place.position :]
    elif place.position < len(args):
        value = args[place.position]
    else:
        value = kwargs.get(place.keyword)
    return _walk(value, place.steps, place.dim.path)


def step_value(path: str) -> Any:
    """What traced code finds under ``"step.seq_lens"``; ``None`` where nothing is there."""
    _, root, *steps = path.split(".")
    said = current()
    if said is None or root not in said.inputs.names:
        return None
    return _walk(said.inputs.for_a_trace(root), steps, path)


def _walk(value: Any, steps: Iterable[str], path: str) -> Any:
    for step in steps:
        if value is None:
            return None
        value = _step(value, step, path)
    return value


def _step(value: Any, step: str, path: str) -> Any:
    if isinstance(value, Mapping):
        return value.get(int(step)) if step.isdecimal() and step not in value else value.get(step)
    if isinstance(value, (list, tuple)) and step.isdecimal():
        return value[int(step)] if int(step) < len(value) else None
    if hasattr(value, step):
        return getattr(value, step)
    known = [f.name for f in fields(value)] if is_dataclass(value) else list(getattr(value, "__dict__", ()))
    raise DimError(f"{path}: {type(value).__name__} has no field {step!r}; {did_you_mean(step, known)}")


def is_container(value: object) -> bool:
    """Whether :func:`leaves` looks inside."""
    return isinstance(value, (Mapping, list, tuple)) or (is_dataclass(value) and not isinstance(value, type))


def leaves(path: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in a value (itself, or in mappings, lists, tuples and dataclasses), each with its dotted path."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves(f"{path}.{key}", inner)
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from leaves(f"{path}.{index}", inner)
    elif is_dataclass(value):
        for each in fields(value):
            yield from leaves(f"{path}.{each.name}", getattr(value, each.name))
