"""How captured results reach the caller when they are not cloned: lent where they are, or copied into a ring.

Either way the plan keeps the memory for its outputs alone, so no other plan of the pool writes into it; and a tensor
that was handed out keeps its memory alive, also when the plan is gone. Every call hands out new tensor objects: what a
caller does to the size, the strides or the autograd state of one is not seen by the next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from graphcap.config import Config
from graphcap.cudagraph.hardware.device import GraphDevice
from graphcap.cudagraph.private import bytes_of, fixed_storage, increment_version, over_storage
from graphcap.cudagraph.recording.arena import aligned_block, span_bytes


@dataclass(frozen=True, slots=True)
class Policy:
    """What ``Config.outputs`` asks for.

    Attributes:
        name: the value of the setting.
        lifetime: which later replay of its plan overwrites an output: the first, the second; 0 is none, by a clone.
        in_place: whether outputs are the memory that captured steps write.
        checked: whether reading an output too late raises.
    """

    name: str
    lifetime: int
    in_place: bool
    checked: bool

    @classmethod
    def of(cls, config: Config, checked: bool) -> Policy:
        """Read the setting."""
        kind, _, number = config.outputs.partition(":")
        lifetime = int(number) if number else {"clone": 0, "static": 1}[kind]
        return cls(config.outputs, lifetime, kind == "static", checked)

    def too_late(self, region: str) -> str:
        """The message for an output that is read too late."""
        return (
            f"an output of {region} was read after a later replay had written into its memory: outputs={self.name!r} "
            f"keeps it for {self.lifetime} replay(s). Read or clone it before the next call, or set outputs='clone'"
        )


class HandOut(Protocol):
    """Memory that outputs are handed out in."""

    def over(self, blocks: Sequence[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
        """What a replay calls when the captured results are complete.

        Args:
            blocks: per block of the plan all of it, or a part of it.

        Returns:
            A function that returns a new tensor for each block, of its size and strides.
        """


class Lent:
    """The results where they are, until the plan runs again."""

    def over(self, blocks: Sequence[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
        """See :class:`HandOut`."""
        lent = tuple(blocks)

        def hand_out() -> list[torch.Tensor]:
            # Autograd may have saved one for a backward pass: it then reports that the value has changed.
            increment_version(lent)
            return [block.detach() for block in lent]

        return hand_out


class Ring:
    """Copies in one of several buffers, each in its turn."""

    def __init__(self, blocks: Sequence[torch.Tensor], num_turns: int, device: GraphDevice) -> None:
        """Allocate ``num_turns`` buffers for each block, which is dense, outside the pool."""
        self._starts = [int(block.storage_offset()) for block in blocks]
        self._buffers = [[_buffer_for(block, device) for block in blocks] for _ in range(num_turns)]
        self._turn = -1

    def over(self, blocks: Sequence[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
        """See :class:`HandOut`. The functions for several parts of the same blocks take their turns together."""
        with torch.inference_mode(False), torch.no_grad():
            turns = [
                [
                    buffer.as_strided(block.size(), block.stride(), int(block.storage_offset()) - start)
                    for buffer, block, start in zip(buffers, blocks, self._starts, strict=True)
                ]
                for buffers in self._buffers
            ]
        copies = [_grouped_copies(targets, blocks) for targets in turns]
        num_turns = len(turns)

        def hand_out() -> list[torch.Tensor]:
            turn = self._turn = (self._turn + 1) % num_turns
            for copy in copies[turn]:
                copy()
            return [target.detach() for target in turns[turn]]

        return hand_out


def _grouped_copies(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> list[Callable[[], Any]]:
    """One copy for each dtype."""
    groups: dict[torch.dtype, list[int]] = {}
    for number, source in enumerate(sources):
        groups.setdefault(source.dtype, []).append(number)
    return [
        partial(targets[group[0]].copy_, sources[group[0]])
        if len(group) == 1
        else partial(torch._foreach_copy_, [targets[each] for each in group], [sources[each] for each in group])
        for group in groups.values()
    ]


def _buffer_for(block: torch.Tensor, device: GraphDevice) -> torch.Tensor:
    memory = aligned_block(device, span_bytes(block))
    return over_storage(fixed_storage(memory), block, 0)


def kept_blocks(blocks: Sequence[torch.Tensor], owners: Mapping[int, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The same blocks over memory that they keep alive.

    Args:
        blocks: non-owning tensors.
        owners: per block a value of the call whose storage owns the memory.
    """
    return tuple(_keep(block, owners[number]) for number, block in enumerate(blocks))


def _keep(block: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
    storage = owner.untyped_storage()
    return over_storage(fixed_storage(bytes_of(storage, 0, storage.nbytes())), block, int(block.storage_offset()))
