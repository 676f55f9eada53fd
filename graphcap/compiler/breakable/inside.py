"""A live function, watched from inside: what it meets, makes and writes, and the step inputs that it asks for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from graphcap.compiler import nodes, private
from graphcap.compiler.breakable.numbering import Numbering
from graphcap.compiler.effects import declared_written
from graphcap.cudagraph.dispatch.step import current


@dataclass(slots=True)
class Inside:
    """What happens within one live function, by storage.

    Attributes:
        given: what it was given.
        met: the first tensor, before any view of it.
        made: by the function itself.
        written: a tensor of each storage that it writes and has not made.
        asked: the inputs of the step that it looks for.
        moves_on: whether it writes, by an operation on nothing that it was given or has made: a counter, a position.
    """

    given: set[int]
    met: dict[int, torch.Tensor] = field(default_factory=dict)
    made: set[int] = field(default_factory=set)
    written: dict[int, torch.Tensor] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)
    moves_on: bool = False

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator of the function and watch it."""
        operands = [each for each in nodes.leaves([*args, *kwargs.values()]) if torch.is_tensor(each)]
        before = set(map(private.storage_id, operands))
        for tensor in nodes.leaves(list(declared_written(func, args, kwargs))):
            if isinstance(tensor, torch.Tensor) and private.storage_id(tensor) not in self.made:
                storage = private.storage_id(tensor)
                self.written.setdefault(storage, self.met.get(storage, tensor))
                self.moves_on |= before.isdisjoint(self.given | self.made)
        result = func(*args, **kwargs)
        self.made |= {private.storage_id(each) for each in nodes.leaves(result) if torch.is_tensor(each)} - before
        return result

    def meet(self, args: Any, kwargs: Any, numbering: Numbering) -> str:
        """Look at what an operator is given. Returns why the function is no call of its own, ``""`` where it may be."""
        for tensor in nodes.leaves([*args, *kwargs.values()]):
            if isinstance(tensor, torch.Tensor):
                storage = private.storage_id(tensor)
                self.met.setdefault(storage, tensor)
                origin = numbering.made_at(storage)
                if origin is not None and storage not in self.given | self.made:
                    return f"an @graphcap.eager function uses a value of {origin} without being given it"
        return ""


@contextlib.contextmanager
def asked_apart(asked: set[str]) -> Iterator[None]:
    """Within it, what is asked of the step's inputs is added to ``asked`` alone: a live function asks on every call."""
    said = current()
    if said is None:
        yield
        return
    outer, said.inputs.asked = said.inputs.asked, asked
    try:
        yield
    finally:
        said.inputs.asked = outer
