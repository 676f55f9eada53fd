"""The values of a capturing call: what its live steps read, and what its captured steps read in the place of that.

A captured step must find everything at an address that lasts: inputs in place or in the arena, results of live steps
in bridges. What captured steps leave is owned until its last reader has been recorded or has run; after that a
non-owning view is left, and the memory is free for what follows.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from graphcap.cudagraph.private import storage_address, weak_view
from graphcap.cudagraph.program import Step
from graphcap.cudagraph.recording.arena import Arena, copy_into, flat, overlaps_itself
from graphcap.cudagraph.recording.bindings import Binding
from graphcap.cudagraph.recording.bridges import Bridges, BridgeSpace
from graphcap.cudagraph.recording.in_place import InPlace
from graphcap.cudagraph.recording.recorded import Recorded, inputs_written_back, padded_inputs_written
from graphcap.cudagraph.recording.sharing import Sharing


class Values:
    """The slot table of one capturing call, which fills in ``recorded`` as it goes.

    Attributes:
        slots: what live steps read.
        bound: what captured steps read.
    """

    def __init__(self, recorded: Recorded, args: Sequence[Any], device: torch.device) -> None:
        """Begin with the arguments of the call; :meth:`bind_inputs` comes next."""
        nothing = [None] * (len(recorded.seen.roots) - len(args))
        self.slots: list[Any] = [*args, *nothing]
        self.bound: list[Any] = [*args, *nothing]
        self._recorded = recorded
        self._padded = {index: args[index] for index in recorded.layout.inputs_bound(Binding.PADDED)}
        self._sharing = Sharing(recorded.seen, len(recorded.program.inputs), device)
        self._outlived: list[int] = []  # live results to drop when the segment is closed
        self._last_read = {slot: number for number, slots in enumerate(recorded.layout.releases) for slot in slots}

    def bind_inputs(self, arena: Arena, space: BridgeSpace, in_place: InPlace) -> None:
        """Give every input that captured steps read its place, and copy in what is copied. ``space`` is for the results
        of live steps later on."""
        self._bridges = Bridges(space)
        recorded, layout = self._recorded, self._recorded.layout
        copied = layout.inputs_bound(Binding.COPIED, Binding.COPIED_BACK, Binding.PADDED)
        buffers, block = arena.buffers([self.slots[index] for index in copied])
        recorded.blocks.append(block)
        addresses = [_address(each) for each in self.slots[: len(layout.bindings)]]
        self._sharing.add_inputs(addresses)
        for index, stand_in in zip(copied, buffers, strict=True):
            self._stand_in(index, stand_in, storage_address(stand_in))
            copy_into(stand_in, self.slots[index])
        for index in layout.inputs_bound(Binding.STATIC):
            self._stand_in(index, in_place.view(index, self.slots[index]), addresses[index])
        for index in self._padded:
            self.slots[index] = self.bound[index]

    def _stand_in(self, index: int, stand_in: torch.Tensor, address: int) -> None:
        self.bound[index] = self._recorded.stand_ins[index] = stand_in
        if address:
            self._recorded.memory.homes.setdefault(address, (index, stand_in))
        self._sharing.add_stand_in(index, address)

    def recorded_step(self, step: Step, read: Sequence[Any], results: Sequence[Any], asked: Collection[str]) -> None:
        """A captured step was recorded, and looked for the names ``asked`` among the inputs of the ``graphcap.step``.

        Raises:
            RuntimeError: a result shares memory in another way than in the warm-up.
        """
        self._sharing.check_asked(asked, is_captured=True)
        recorded, layout = self._recorded, self._recorded.layout
        for slot, value in zip(step.reads, read, strict=True):
            if slot not in layout.captured:
                recorded.given[slot] = value
        for slot, value in zip(step.writes, results, strict=True):
            address = self._sharing.check(slot, value, self.bound)
            self.slots[slot] = self.bound[slot] = value
            if recorded.seen.roots[slot] == slot:
                recorded.memory.pool.add(address)
            if slot in layout.crossing:
                recorded.constants[slot] = weak_view(value) if isinstance(value, torch.Tensor) else value

    def ran(self, step: Step, results: Sequence[Any]) -> None:
        """A live step has run."""
        for slot, value in zip(step.writes, results, strict=True):
            self.slots[slot] = self.bound[slot] = value

    def blank(self, step: Step) -> None:
        """A live step does not run: what it would have written of the memory that captured steps have made, which may
        hold anything, holds zeros. State stays as it is."""
        for slot in step.mutates:
            if self._recorded.seen.roots[slot] >= len(self._recorded.program.inputs):
                value = self.slots[slot]
                (flat(value) if overlaps_itself(value) else value).zero_()

    def place_results(self, number: int, step: Step, asked: Collection[str]) -> None:
        """Let captured steps find a live step's results at an address that lasts. ``asked`` as above.

        Raises:
            RuntimeError: a result shares memory in another way than in the warm-up.
            torch.OutOfMemoryError: there is no memory for a bridge.
        """
        self._sharing.check_asked(asked, is_captured=False)
        for slot in step.writes:
            self._sharing.check(slot, self.slots[slot], self.slots)
            self._give_place(number, slot, self.slots[slot])

    def _give_place(self, number: int, slot: int, value: Any) -> None:
        recorded = self._recorded
        bridged = slot in recorded.layout.bridged
        if slot in recorded.layout.fixed or (bridged and storage_address(value) in recorded.memory.homes):
            recorded.places[slot] = value.data_ptr(), value.size()
            self.bound[slot] = weak_view(value)
        elif bridged:
            bridge, chunk = self._bridges.place(value, number, self._last_read.get(slot, len(recorded.program.steps)))
            copy_into(bridge, value)
            recorded.blocks.append(chunk)
            recorded.stand_ins[slot] = self.bound[slot] = bridge
            recorded.memory.homes[storage_address(bridge)] = slot, bridge
            self._sharing.add_stand_in(slot, storage_address(bridge))

    def release(self, number: int) -> list[Any]:
        """Give up the memory of results whose last reader has been recorded or has run; views of those that captured
        steps made."""
        released = []
        constants = self._recorded.constants
        for slot in self._recorded.layout.releases[number]:
            if slot not in self._recorded.layout.captured:
                self._outlived.append(slot)
                continue
            # A weak view stays: were the current recording to fail, its steps would read it again, unchanged.
            value = self.slots[slot]
            if slot in constants:
                value = constants[slot]
            elif isinstance(value, torch.Tensor):
                value = weak_view(value)
            self.slots[slot] = self.bound[slot] = value
            released.append(value)
        return released

    def segment_ran(self, first: int, stop: int) -> None:
        """The captured steps ``first <= step < stop`` have run."""
        for index in inputs_written_back(self._recorded, first, stop):
            copy_into(self.slots[index], self._recorded.stand_ins[index])
        self.drop_outlived()

    def drop_outlived(self) -> None:
        """Between two segments: live results whose last reader was recorded."""
        for slot in self._outlived:
            self.slots[slot] = self.bound[slot] = None
        self._outlived = []

    def give_back(self, first: int) -> None:
        """Nothing recorded has run, so nothing reads what the recordings hold, and the live run, which begins with step
        ``first``, needs the memory."""
        recorded = self._recorded
        for step in recorded.program.steps[first:]:
            for slot in step.writes:
                self.slots[slot] = None
        self.bound, recorded.pool = [], None
        if not any(self.slots[slot] is stand_in for slot, stand_in in recorded.stand_ins.items()):
            recorded.blocks.clear()
            recorded.stand_ins.clear()
            recorded.memory.homes.clear()

    def return_padded(self) -> None:
        """Hand the padded inputs that were written back to whoever gave them."""
        for index in padded_inputs_written(self._recorded):
            copy_into(self._padded[index], self._recorded.stand_ins[index])


def _address(value: Any) -> int:
    return storage_address(value) if isinstance(value, torch.Tensor) else 0
