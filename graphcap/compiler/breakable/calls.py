"""What a recording consists of: values, calls, and how two recordings compare."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from graphcap.compiler.breakable.key import same_leaf
from graphcap.compiler.breakable.origin import Origin
from graphcap.compiler.rules import op_name


class Kind(enum.Enum):
    """Where a value comes from."""

    ARGUMENT = "argument"
    OUTSIDE = "outside"  #: neither an argument nor made in the call: a parameter, a global, a tensor in a closure
    NUMBERS = "numbers"  #: made from Python numbers in the call: ``torch.tensor(3.0)``
    RESULT = "result"


def nothing() -> None:
    """The tensor of a value that operators made."""


@dataclass(slots=True)
class Value:
    """One value of a recorded call.

    Attributes:
        storage: identity of its memory, within this recording.
        layout: see :func:`~graphcap.compiler.breakable.key.layout_of`.
        origin: where it showed up.
        tensor: for what comes from outside or out of a live call, without keeping it alive.
        numbers: for what was made of Python numbers, a copy of it as it was made.
    """

    kind: Kind
    storage: int
    layout: tuple[Any, ...]
    origin: Origin
    tensor: Callable[[], torch.Tensor | None] = nothing
    numbers: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Ref:
    """Stands for the value of this number among the arguments of a call."""

    value: int


@dataclass(frozen=True, slots=True)
class Weak:
    """Stands for an object among the arguments of a call that must not be kept alive, such as the model."""

    object: Callable[[], Any]


@dataclass(slots=True)
class Call:
    """One operator or one ``@graphcap.eager`` function.

    Attributes:
        function: the operator, or the user's own function.
        leaves, spec: its arguments, flat; tensors are :class:`Ref`, objects that are no plain values :class:`Weak`.
        also: values that it reads or writes without being given them.
        results: per leaf of its result the number of a new value, ``None`` for one that was known or is no tensor.
        bare: whether it returned one tensor, and no container of tensors.
        written: the storages that it writes.
        live: why a graph cannot hold it, ``""`` where one can.
        origin: where the user wrote it.
        outcome: in a recording that keeps outcomes, what a live call did; ``None`` where that cannot be repeated.
    """

    function: Any
    leaves: tuple[Any, ...]
    spec: Any
    results: tuple[int | None, ...]
    written: frozenset[int]
    live: str
    origin: Origin
    also: tuple[int, ...] = ()
    bare: bool = True
    outcome: Outcome | None = None

    def reads(self) -> list[int]:
        """The values that it reads, each once, those that it is given first."""
        return list(dict.fromkeys([*(leaf.value for leaf in self.leaves if isinstance(leaf, Ref)), *self.also]))


@dataclass(slots=True)
class Outcome:
    """What a live call did, for a replay that must not do it again.

    Attributes:
        results: copies of the tensors that it made.
        written: per value that it wrote a copy of what stood there afterwards.
        generators: the state of the random number generators afterwards.
    """

    results: list[torch.Tensor]
    written: dict[int, torch.Tensor]
    generators: Any


class Recorded(Protocol):
    """What a recording holds; see :class:`graphcap.compiler.breakable.record.Recorder`."""

    values: list[Value]
    calls: list[Call]
    outputs: list[tuple[int, int]]


def difference(a: Recorded, b: Recorded) -> str:
    """Where two recordings part, in one line; ``""`` where one could stand for the other.

    Values that were made of Python numbers must have equal bits, those from outside must be the same tensor.
    """
    for first, second in zip(a.calls, b.calls, strict=False):
        if first.function is not second.function:
            return f"{_name(first)} at {first.origin} in one call, {_name(second)} at {second.origin} in the next"
        same = len(first.leaves) == len(second.leaves) and all(map(_same_argument, first.leaves, second.leaves))
        if not same or first.spec != second.spec or first.results != second.results or first.also != second.also:
            return f"{_name(first)} at {first.origin} has other arguments in the next call"
    if len(a.calls) != len(b.calls):
        longer = max(a.calls, b.calls, key=len)
        extra = longer[min(len(a.calls), len(b.calls))]
        return f"{_name(extra)} at {extra.origin} runs in one of two calls"
    if len(a.values) != len(b.values) or a.outputs != b.outputs:
        return "the calls return different values"
    for one, other in zip(a.values, b.values, strict=True):
        if one.kind is not other.kind or one.layout != other.layout:
            return f"a tensor used at {one.origin} has another layout in the next call"
        if one.kind is Kind.NUMBERS and not _same_bits(one.numbers, other.numbers):
            return f"the tensor made from numbers at {one.origin} has other values in the next call"
        if one.kind is Kind.OUTSIDE and (one.tensor() is not other.tensor() or one.tensor() is None):
            return f"another tensor is used at {one.origin} in the next call"
    return ""


def _same_argument(a: Any, b: Any) -> bool:
    if isinstance(a, Weak) and isinstance(b, Weak):
        return a.object() is b.object() is not None
    return a == b if isinstance(a, Ref) and isinstance(b, Ref) else same_leaf(a, b)


def _name(call: Call) -> str:
    return op_name(call.function)


def _same_bits(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    assert a is not None
    assert b is not None
    return bool(torch.equal(_bytes(a), _bytes(b)))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
