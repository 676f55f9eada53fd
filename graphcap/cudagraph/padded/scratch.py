"""Running a program again without the caller seeing it: copies of everything that it writes, and of the generators."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch

from graphcap.cudagraph.private import over_storage
from graphcap.cudagraph.program import Program
from graphcap.cudagraph.recording.bindings import MemoryFacts
from graphcap.cudagraph.recording.observe import Observation, argument_roots


class Scratch:
    """The state of a call before it ran: the storages of all arguments that the program writes.

    Attributes:
        written: the arguments that lie in one of these storages, sorted.
    """

    def __init__(self, program: Program, seen: Observation, args: Sequence[Any]) -> None:
        """Copy the state. :func:`state_bytes` says how much that takes."""
        self.written, self._storages = _written_storages(program, seen, args)
        self._before = {address: storage.clone() for address, storage in self._storages.items()}

    def arguments(self, args: Sequence[Any]) -> list[Any]:
        """The arguments of the call, those that are written in fresh memory, as they were before it."""
        fresh = {address: storage.clone() for address, storage in self._before.items()}
        again = list(args)
        for index in self.written:
            address = args[index].untyped_storage().data_ptr()
            again[index] = over_storage(fresh[address], args[index], args[index].storage_offset())
        return again


def state_bytes(program: Program, seen: Observation, args: Sequence[Any]) -> int:
    """The bytes of all storages that the program writes into and the caller owns."""
    return sum(storage.nbytes() for storage in _written_storages(program, seen, args)[1].values())


def _written_storages(
    program: Program, seen: Observation, args: Sequence[Any]
) -> tuple[list[int], dict[int, torch.UntypedStorage]]:
    mutated: Collection[int] = MemoryFacts(program, seen).mutated
    roots = argument_roots(args)
    groups = {roots[index] for index in range(len(args)) if roots[index] >= 0 and seen.roots[index] in mutated}
    written = [index for index, root in enumerate(roots) if root in groups]
    storages = {args[index].untyped_storage().data_ptr(): args[index].untyped_storage() for index in written}
    return written, storages


@contextlib.contextmanager
def same_random_numbers(device: torch.device, states: Sequence[torch.Tensor]) -> Iterator[None]:
    """Within it the generators begin at these states; after it they are as they were before."""
    before = generator_states(device)
    _set_generator_states(device, states)
    try:
        yield
    finally:
        _set_generator_states(device, before)


def generator_states(device: torch.device) -> list[torch.Tensor]:
    """The states of the default generators of the CPU and of a device."""
    cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *cuda]


def _set_generator_states(device: torch.device, states: Sequence[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
