"""The values of one recording: numbered in the order in which they show up.

A value is known by its memory and layout, not by its Python object, as autograd hands out new objects for the same
view. Storages are remembered weakly: a recording keeps alive no more than the function itself does, and yet no storage
is taken for an earlier one at the same address.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch

from graphcap.compiler import private
from graphcap.compiler.breakable.calls import Kind, Ref, Value, Weak, nothing
from graphcap.compiler.breakable.key import PLAIN, layout_of
from graphcap.compiler.breakable.origin import Origin, here


class Numbering:
    """Numbers tensors.

    Attributes:
        values: by number; the arguments come first.
        outside: by storage the first value from outside in it.
        refusal: why the call cannot be repeated, ``""`` where it can.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        """Begin with the arguments."""
        self.values: list[Value] = []
        self.outside: dict[int, int] = {}
        self.refusal = ""
        self._known: dict[tuple[Any, ...], int] = {}
        self._made: dict[int, tuple[Callable[[], bool], Origin]] = {}
        for tensor in tensors:
            self.add(tensor, Kind.ARGUMENT, Origin("", "", ""))

    def refuse(self, why: str) -> None:
        """The call cannot be repeated. The first reason counts."""
        self.refusal = self.refusal or f"{why} ({here()})"

    def number(self, tensor: torch.Tensor) -> int:
        """The number of a value, which comes from outside where it was not met before."""
        if not self.is_new(tensor):
            return self._known[identity(tensor)]
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
            self.refuse(f"{type(tensor).__name__} with layout {tensor.layout}: only plain tensors can be recorded")
        elif private.storage_id(tensor) in self._made:
            self.refuse("a view was made that no operator shows")
        return self.add(tensor, Kind.OUTSIDE, here())

    def number_in(self, tensor: torch.Tensor) -> int:
        """The number of any value from outside in a tensor's memory."""
        known = self.outside.get(private.storage_id(tensor))
        return self.number(tensor) if known is None else known

    def refs(self, leaves: Sequence[Any]) -> tuple[Any, ...]:
        """The leaves of a call's arguments, as they are kept."""
        return tuple(Ref(self.number(leaf)) if isinstance(leaf, torch.Tensor) else _weak(leaf) for leaf in leaves)

    def is_new(self, tensor: torch.Tensor) -> bool:
        """Whether a value was not met before."""
        return identity(tensor) not in self._known

    def made_at(self, storage: int) -> Origin | None:
        """Where the memory was made, ``None`` where that was not in this call."""
        found = self._made.get(storage)
        return None if found is None else found[1]

    def add(self, tensor: torch.Tensor, kind: Kind, origin: Origin) -> int:
        """Number a new value."""
        number, storage = len(self.values), private.storage_id(tensor)
        self._known[identity(tensor)] = number
        value = Value(kind, storage, layout_of(tensor), origin)
        if kind in (Kind.ARGUMENT, Kind.OUTSIDE):
            value.tensor = weakref.ref(tensor)
            self.outside.setdefault(storage, number)
        elif storage not in self.outside and storage not in self._made:
            self._made[storage] = private.weak_storage(tensor), origin
        if kind is Kind.NUMBERS:
            value.numbers = tensor.clone()
        self.values.append(value)
        return number

    def results(self, leaves: Sequence[Any]) -> list[tuple[int, int]]:
        """The tensors of a call's result: of each its value, and which object: 0 is the value itself, others are views
        of it."""
        found: list[tuple[int, int]] = []
        objects: dict[int, list[int]] = {}
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor):
                number = self.number(leaf)
                itself = self.values[number].tensor()
                # Of what an operator made any object is the value; a live call may have returned what it was given.
                seen = objects.setdefault(number, [] if self.values[number].tensor is nothing else [id(itself)])
                if id(leaf) not in seen:
                    seen.append(id(leaf))
                found.append((number, seen.index(id(leaf))))
                if leaf.requires_grad and leaf is not itself:
                    self.refuse("a result needs grad: call it under torch.no_grad() or torch.inference_mode()")
        return found

    def check_forms(self) -> None:
        """Refuse where a tensor is not laid out any more as it was met."""
        for value in self.values:
            if (tensor := value.tensor()) is not None and layout_of(tensor) != value.layout:
                self.refuse("a tensor was given another form or dtype in place")

    def outlived(self, result: Sequence[Any]) -> str:
        """Which value of the call is still alive though it was not returned, ``""`` if none is: a replay makes none."""
        returned = {private.storage_id(leaf) for leaf in result if isinstance(leaf, torch.Tensor)}
        left = [storage for storage, (expired, _) in self._made.items() if storage not in returned and not expired()]
        if left:
            gc.collect()
            left = [storage for storage in left if not self._made[storage][0]()]
        origins = [self._made[storage][1] for storage in left]
        return f"the value made at {origins[0]} is kept beyond the call, which a replay would not do" if origins else ""


def identity(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What a value is known by."""
    if tensor.layout is not torch.strided:
        return (id(tensor),)
    return private.storage_id(tensor), tensor.storage_offset(), *layout_of(tensor)


def _weak(leaf: Any) -> Any:
    if isinstance(leaf, (*PLAIN, FunctionType)):
        return leaf
    try:
        return Weak(weakref.ref(leaf))
    except TypeError:
        return leaf
