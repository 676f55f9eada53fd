"""Dynamic dims: which dims of which arguments change between calls, and which of them have the same size.

:func:`parse` reads what a user declares, :func:`infer` reads annotations; ``call_dims.py`` applies them to a call.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Any, NamedTuple

import torch

from graphcap.errors import DimError

#: The name of a dim that is given as a plain int, and of every inferred one.
DEFAULT_NAME = "num_tokens"

_FORMS = "an int, a list of ints, {dim: name}, {dim: Dim(...)} or {field: ...} for a nested input"

#: A name that follows another one: "num_reqs+1", "2*num_reqs", "2*num_reqs - 1".
_DERIVED = re.compile(r"(?:(?P<scale>[1-9]\d*)\s*\*\s*)?(?P<name>[A-Za-z_]\w*)(?:\s*(?P<sign>[+-])\s*(?P<offset>\d+))?")


@dataclass(frozen=True, slots=True)
class Dim:
    """The name of a dynamic dim, with what else is known about it.

    Attributes:
        name: dims of one name have one size.
        max: the largest size. A dim with it lives in a buffer of that size: one graph serves all its sizes.
    """

    name: str
    max: int | None = None

    def __post_init__(self) -> None:
        name: object = self.name
        if not isinstance(name, str) or not name:
            raise DimError(f"Dim: expected a name, got {name!r}")
        if self.max is not None and (not _is_int(self.max) or self.max < 1):
            raise DimError(f"Dim({name!r}): max is the largest size, at least 1, got {self.max!r}")


class DynamicDim(NamedTuple):
    """One dim of one argument.

    Attributes:
        path: the argument, with the way into a nested one: ``"input_ids"``, ``"batch.ids"``, ``"caches.0"``.
            Where it ends at a container, every tensor in it is meant.
        dim: the index of the dim; negative ones count from the end.
        name: dims of one name have one size.
        max: the largest size, where it lives in a buffer of that size.
    """

    path: str
    dim: int
    name: str
    max: int | None = None

    @property
    def follows(self) -> tuple[str, int, int] | None:
        """For a name such as ``"2*num_reqs+1"`` the other name, the factor and what is added, otherwise ``None``."""
        match = _DERIVED.fullmatch(self.name)
        if match is None or (match["scale"] is None and match["sign"] is None):
            return None
        offset = int(f"{match['sign']}{match['offset']}") if match["sign"] else 0
        return match["name"], int(match["scale"] or 1), offset


def parse(declared: Mapping[str, Any]) -> tuple[DynamicDim, ...]:
    """Read ``dynamic_arg_dims``.

    Args:
        declared: per argument an int (named ``"num_tokens"``), a list of ints (each its own name), ``{dim: name}`` or
            ``{dim: Dim(name, max=...)}``, or, for a nested input, ``{field: any of these}``. A dotted key is the same
            as nesting. A name may follow another one: ``"num_reqs+1"``.

    Raises:
        DimError: anything else.
    """
    if not isinstance(declared, Mapping):
        raise DimError(f"dynamic_arg_dims: expected a dict of argument names, got {declared!r}")
    return tuple(dim for path, value in declared.items() for dim in _parse_one(path, value))


def _parse_one(path: object, value: Any) -> Iterator[DynamicDim]:
    if not isinstance(path, str) or not path:
        raise DimError(f"dynamic_arg_dims: an argument is named by a string, got {path!r}")
    if _is_int(value):
        yield DynamicDim(path, value, DEFAULT_NAME)
    elif isinstance(value, (list, tuple)) and value and all(map(_is_int, value)):
        # Two dims of one tensor are rarely the same size, so a list names none of them together.
        names = [DEFAULT_NAME] if len(value) == 1 else [f"{path}.{dim}" for dim in value]
        yield from (DynamicDim(path, dim, name) for dim, name in zip(value, names, strict=True))
    elif isinstance(value, Mapping) and value and all(map(_is_int, value)):
        for dim, given in value.items():
            if not isinstance(given, Dim) and (not isinstance(given, str) or not given):
                raise DimError(f"dynamic_arg_dims[{path!r}]: dim {dim} needs a name or a graphcap.Dim, got {given!r}")
            named = given if isinstance(given, Dim) else Dim(given)
            yield DynamicDim(path, dim, named.name, named.max)
    elif isinstance(value, Mapping) and value and all(isinstance(key, str) for key in value):
        for key, inner in value.items():
            yield from _parse_one(f"{path}.{key}", inner)
    else:
        raise DimError(f"dynamic_arg_dims[{path!r}]: expected {_FORMS}, got {value!r}")


def unparse(dims: Sequence[DynamicDim]) -> dict[str, Any]:
    """What :func:`parse` reads as these dims."""
    declared: dict[str, Any] = {}
    for dim in dims:
        declared.setdefault(dim.path, {})[dim.dim] = dim.name if dim.max is None else Dim(dim.name, dim.max)
    return declared


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def infer(fn: Callable[..., Any]) -> tuple[DynamicDim, ...]:
    """Dim 0 of every parameter annotated as a tensor or an optional one. What fails to resolve is skipped."""
    parameters = inspect.signature(fn).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    hints = _hints(fn, [p.name for p in named])
    return tuple(DynamicDim(p.name, 0, DEFAULT_NAME) for p in named if _is_tensor_type(hints.get(p.name)))


def _hints(fn: Callable[..., Any], names: Sequence[str]) -> dict[str, Any]:
    source = inspect.unwrap(fn)
    try:
        return typing.get_type_hints(source)
    except Exception:  # a name that exists for type checkers only; one bad annotation must not cost the others
        given = getattr(source, "__annotations__", {})
        return {name: _evaluate(given[name], source) for name in names if name in given}


def _evaluate(annotation: Any, source: Callable[..., Any]) -> Any:
    if not isinstance(annotation, str):
        return annotation
    # Tensor itself is often imported under TYPE_CHECKING: offer it where the module does not have it.
    usual = {"torch": torch, "Tensor": torch.Tensor, "Optional": typing.Optional, "Union": typing.Union}
    try:
        return eval(annotation, {**usual, **getattr(source, "__globals__", {})})
    except Exception:
        return None


def _is_tensor_type(hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        return _is_tensor_type(typing.get_args(hint)[0])
    if origin in (typing.Union, UnionType):
        members = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        return bool(members) and all(map(_is_tensor_type, members))
    if not isinstance(hint, type):
        return False
    # torch.LongTensor and its kin are tensor types that are not subclasses of torch.Tensor.
    return issubclass(hint, torch.Tensor) or (hint.__module__ == "torch" and hint.__name__.endswith("Tensor"))
