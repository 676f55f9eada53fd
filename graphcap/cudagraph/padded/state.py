"""What a call writes: the memory of all arguments that its program writes into, in contiguous pieces."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from graphcap.cudagraph.private import bytes_of, storage_address, unowned
from graphcap.cudagraph.program import Program
from graphcap.cudagraph.recording.bindings import MemoryFacts
from graphcap.cudagraph.recording.observe import Observation, argument_roots

_BYTES = (torch.uint8, torch.int8)
_MAX_EDGE_BYTES = 2**18
_MAX_EDGE_PART = 64  #: an edge is no larger than this part of its tensor


@dataclass(frozen=True, slots=True)
class Edge:
    """Part of an argument that was as the copy is.

    Attributes:
        argument: its number.
        index: of the part, for the leading dims.
        copy: the part.
    """

    argument: int
    index: tuple[int, ...]
    copy: torch.Tensor


@dataclass(slots=True)
class State:
    """One contiguous piece of memory that the call writes.

    Attributes:
        memory: uint8 over all of it, the caller's.
        arguments: those that lie in it, each with its first element counted from the start of the memory.
        dtypes: of the arguments.
        before: a copy made before the call; ``None`` where it is stood in for.
        digests: of its pages before the call, where it is.
        edges: copies made before the call of the first and last rows of the arguments, where it is.
        touched: the pages that the call has written.
    """

    memory: torch.Tensor
    arguments: dict[int, int]
    dtypes: set[torch.dtype]
    before: torch.Tensor | None = None
    digests: torch.Tensor | None = None
    edges: list[Edge] = field(default_factory=list)
    touched: list[int] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Of the memory."""
        return self.memory.numel()

    def can_be_stood_in_for(self) -> bool:
        """Whether other values lead no kernel astray: integers may say where something is. Bytes are narrow floats."""
        of_numbers = all(each.is_floating_point or each in _BYTES for each in self.dtypes)
        return of_numbers and self.memory.data_ptr() % 8 == 0


def states_of(program: Program, seen: Observation, args: Sequence[Any]) -> list[State]:
    """The memory that the program writes and the caller owns; storages that overlap are one piece."""
    mutated = MemoryFacts(program, seen).mutated
    roots = argument_roots(args)
    written = [index for index, root in enumerate(roots) if root >= 0 and seen.roots[index] in mutated]
    groups = {roots[index] for index in written if args[index].untyped_storage().nbytes()}
    return [_state({i: args[i] for i, root in enumerate(roots) if root == group}) for group in sorted(groups)]


def _state(tensors: dict[int, torch.Tensor]) -> State:
    storages = [tensor.untyped_storage() for tensor in tensors.values()]
    start = min(storage.data_ptr() for storage in storages)
    end = max(storage.data_ptr() + storage.nbytes() for storage in storages)
    first = next(iter(tensors.values()))
    memory = bytes_of(unowned(start, first.device, end - start), 0, end - start)
    places = {index: _place(each, start) for index, each in tensors.items()}
    return State(memory, places, {each.dtype for each in tensors.values()})


def _place(tensor: torch.Tensor, start: int) -> int:
    """How many elements lie between an address and the tensor."""
    before, odd = divmod(storage_address(tensor) - start, tensor.element_size())
    if odd:
        raise ValueError("tensors of other dtypes overlap it at odd addresses")
    return before + int(tensor.storage_offset())


def edges_of(index: int, tensor: torch.Tensor) -> list[Edge]:
    """The first and last parts of a tensor, along as few leading dims as make them small: blocks, or rows.

    Rows that belong to nobody are kept there, for writes that are to go nowhere. Such a write is none where it writes
    what is there.
    """
    if tensor.numel() == 0:
        return []
    limit = min(_MAX_EDGE_BYTES, tensor.nbytes // _MAX_EDGE_PART)
    for num_dims in range(1, tensor.dim() + 1):
        leading, rest = tensor.shape[:num_dims], tensor.shape[num_dims:]
        if rest.numel() * tensor.element_size() <= limit:
            places = itertools.product(*(sorted({0, size - 1}) for size in leading))
            return [Edge(index, place, tensor[place].detach().clone()) for place in places]
    return []
