"""Which values of a capturing call lie in one storage, compared with what the warm-up showed.

The layout of a capture was worked out from that, so a value that shares memory in another way ends the capture. Where
the warm-up was one of another size, that is no fault of the step: the size has to show for itself.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from graphcap.cudagraph.private import storage_address
from graphcap.cudagraph.recording.observe import Observation, why_foreign


class UnlikeOtherSizes(RuntimeError):
    """What calls of other sizes have shown does not hold for this one."""


class Sharing:
    """The storages of one capturing call."""

    def __init__(self, seen: Observation, num_inputs: int, device: torch.device) -> None:
        """Know none yet. ``device`` is where captured steps find their tensors."""
        self._seen = seen
        self._num_inputs = num_inputs
        self._device = device
        self._error = UnlikeOtherSizes if seen.is_of_another_size else RuntimeError
        self._addresses: dict[int, set[int]] = {}  # where the storage of each root may be
        self._of_inputs: set[int] = set()  # where the storages of inputs and of their stand-ins are

    def add_inputs(self, addresses: Sequence[int]) -> None:
        """Where the storage of each input is; 0 for what has none."""
        for root, address in zip(self._seen.roots[: self._num_inputs], addresses, strict=True):
            if root >= 0:
                self._addresses.setdefault(root, set()).add(address)
                self._of_inputs.add(address)

    def add_stand_in(self, slot: int, address: int) -> None:
        """Where the memory is that stands for the value of a slot."""
        root = self._seen.roots[slot]
        self._addresses[root].add(address)
        if root < self._num_inputs:
            self._of_inputs.add(address)

    def check(self, slot: int, value: Any, given: Sequence[Any]) -> int:
        """A step has left ``value`` in a slot.

        Args:
            slot: the slot.
            value: what is in it now.
            given: per slot what such a step reads.

        Returns:
            Where its storage begins; 0 for what has no memory.

        Raises:
            UnlikeOtherSizes: it shares memory in another way than at the size that was observed.
            RuntimeError: the same, and this very size was observed.
        """
        root = self._seen.roots[slot]
        if (root >= 0) != isinstance(value, torch.Tensor):
            raise self._error(f"slot {slot} held {'a tensor' if root >= 0 else 'no tensor'} in the warm-up only")
        if root < 0:
            return 0
        address = storage_address(value)
        if root == slot:
            self._addresses[slot] = {address}
            fits = address not in self._of_inputs
        else:
            fits = address in self._addresses[root]
        if address and not fits:
            raise self._error(f"slot {slot} shares memory with other values than in the warm-up")
        if self._seen.is_of_another_size:
            self._check_kind(slot, value, given[self._seen.identity[slot]])
        return address

    def check_asked(self, asked: Collection[str], is_captured: bool) -> None:
        """A step has looked for these names among the inputs of the ``graphcap.step``.

        Raises:
            UnlikeOtherSizes: such a step looked for others at the size that was observed.
        """
        if self._seen.is_of_another_size:
            known = self._seen.asked if is_captured else self._seen.asked | self._seen.asked_live
            if others := sorted(set(asked) - known):
                raise self._error(f"a step looks for {others[0]!r} among the inputs of the step, at this size only")

    def _check_kind(self, slot: int, value: torch.Tensor, same: Any) -> None:
        """What a call of this very size would have shown besides."""
        if bool(why_foreign(slot, value, self._device)) != (slot in self._seen.foreign):
            raise self._error(f"slot {slot} is on {value.device}, and was not at another size")
        if self._seen.identity[slot] != slot and _form(value) != _form(same):
            raise self._error(f"slot {slot} is not the tensor that it was at another size")


def _form(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset()
