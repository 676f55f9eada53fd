"""What a recording consists of: values and calls."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from graphcap.compiler.breakable.origin import Origin


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
        moves_on: whether a live call changed what it holds from what it holds: a counter, a position.
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
    moves_on: bool = False
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
        asked: the inputs of the step that it looked for.
    """

    results: list[torch.Tensor]
    written: dict[int, torch.Tensor]
    generators: Any
    asked: frozenset[str] = frozenset()
