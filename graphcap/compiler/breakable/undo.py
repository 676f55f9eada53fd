"""Memory that is put back: what a second run of a call writes must not be seen."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphcap.compiler import private
from graphcap.compiler.breakable.generators import generator_states
from graphcap.cudagraph.hardware.generators import GeneratorStates, set_generator_states
from graphcap.cudagraph.private import bytes_of, over_storage


class Memory:
    """All the bytes that some tensors lie in, each storage once."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        """Look at the tensors; nothing is copied yet."""
        found: dict[int, torch.Tensor] = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            found.setdefault(private.storage_id(tensor), bytes_of(storage, 0, storage.nbytes()))
        self._index = {storage: index for index, storage in enumerate(found)}
        self._places = list(found.values())

    @property
    def nbytes(self) -> int:
        """Of one copy."""
        return sum(place.numel() for place in self._places)

    def copy(self) -> Copy:
        """What is there now, and the random number generators.

        Raises:
            torch.OutOfMemoryError: there is no room for it.
        """
        return Copy([each.clone() for each in self._places], generator_states())

    def restore(self, copy: Copy) -> None:
        """Put it back."""
        for place, value in zip(self._places, copy.storages, strict=True):
            place.copy_(value)
        set_generator_states(copy.generators)

    def within(self, copy: Copy, like: torch.Tensor) -> torch.Tensor:
        """The tensor that lies in a copy as ``like`` lies in its storage."""
        storage = copy.storages[self._index[private.storage_id(like)]].untyped_storage()
        return over_storage(storage, like, int(like.storage_offset()))


class Copy:
    """What was in a :class:`Memory`.

    Attributes:
        storages: the bytes of each.
        generators: the states of the random number generators.
    """

    def __init__(self, storages: list[torch.Tensor], generators: GeneratorStates) -> None:
        self.storages = storages
        self.generators = generators
