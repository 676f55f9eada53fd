"""Where the results of live steps lie for the captured steps that read them.

A bridge is needed from the live step that fills it to the last captured step that reads it. Two bridges of one plan
that are never needed together may share memory, and so may those of different plans of a runner, of which one runs at a
time.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from graphcap.cudagraph.hardware.device import GraphDevice
from graphcap.cudagraph.recording.arena import ALIGNMENT, aligned_block, buffer_like, span_bytes

_CHUNK = 2**20  #: bytes of a new chunk, at least


class BridgeSpace:
    """The chunks of memory that the bridges of a runner's plans lie in. They belong to the plans: a chunk goes with the
    last plan that has a bridge in it."""

    def __init__(self, device: GraphDevice) -> None:
        self._device = device
        self._chunks: list[weakref.ref[torch.Tensor]] = []

    def chunks(self) -> list[torch.Tensor]:
        """Those that are alive, the oldest first."""
        alive = [(ref, chunk) for ref in self._chunks if (chunk := ref()) is not None]
        self._chunks = [ref for ref, _ in alive]
        return [chunk for _, chunk in alive]

    def new_chunk(self, nbytes: int) -> torch.Tensor:
        """One more, of at least ``nbytes`` bytes."""
        chunk = aligned_block(self._device, max(nbytes, _CHUNK))
        self._chunks.append(weakref.ref(chunk))
        return chunk


@dataclass(frozen=True, slots=True)
class _Taken:
    start: int
    stop: int
    until: int


class Bridges:
    """The bridges of one capture."""

    def __init__(self, space: BridgeSpace) -> None:
        self._space = space
        self._chunks: list[torch.Tensor] = []
        self._taken: list[list[_Taken]] = []

    def place(self, value: torch.Tensor, step: int, until: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Make a bridge for a result of live step ``step`` that is read up to step ``until``.

        Returns:
            A tensor of the value's size, strides and dtype, and the chunk that must be kept alive for it.
        """
        nbytes = span_bytes(value)
        number, start = self._find(nbytes, step)
        self._taken[number].append(_Taken(start, start + nbytes, until))
        return buffer_like(self._chunks[number], start, value), self._chunks[number]

    def _find(self, nbytes: int, step: int) -> tuple[int, int]:
        """The first gap that is large enough: the number of its chunk, and where it begins."""
        known = self._space.chunks()
        self._chunks += [chunk for chunk in known if all(chunk is not each for each in self._chunks)]
        self._taken += [[] for _ in self._chunks[len(self._taken) :]]
        for number, chunk in enumerate(self._chunks):
            start = _gap([each for each in self._taken[number] if each.until >= step], nbytes)
            if start + nbytes <= chunk.numel():
                return number, start
        self._chunks.append(self._space.new_chunk(nbytes))
        self._taken.append([])
        return len(self._chunks) - 1, 0


def _gap(taken: Sequence[_Taken], nbytes: int) -> int:
    """The lowest aligned place where nothing in ``taken`` lies."""
    start = 0
    for each in sorted(taken, key=lambda each: each.start):
        if start + nbytes <= each.start:
            break
        start = max(start, -(-each.stop // ALIGNMENT) * ALIGNMENT)
    return start
