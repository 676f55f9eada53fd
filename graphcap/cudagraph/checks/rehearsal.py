"""A recorded segment run again without any graph and without any effect: on copies of the memory that it writes.

It is given what the graph reads, at the very moment before the graph is launched. What it returns can then be compared
with what the graph left, value by value, and can be put in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphcap.cudagraph.checks.rounding import nudged
from graphcap.cudagraph.hardware.generators import same_random_numbers
from graphcap.cudagraph.private import bytes_of, over_storage, storage_address
from graphcap.cudagraph.recording.arena import copy_into, span_bytes
from graphcap.cudagraph.recording.recorded import Recorded, captured_slots

_ALIGNMENT = (
    512  #: bytes; a copy begins at a multiple of it within the storage, so that kernels find the same alignment
)

#: Takes what a step returned and the values that exist besides; returns what the next step gets.
_Disturb = Callable[[Sequence[Any], Iterable[Any]], Sequence[Any]]


class TooLarge(Exception):
    """What a segment writes is more than may be copied."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One value that a rehearsal and the graph both made.

    Attributes:
        step: the number of the step that made it.
        what: ``"result 0"`` or ``"what it wrote into input cache"``.
        expected: the rehearsal's.
        actual: where the graph leaves its own.
    """

    step: int
    what: str
    expected: Any
    actual: Any


class Rehearsal(list[Outcome]):
    """What one rehearsal gave, in the order of the steps. Valid as long as the memory of the plan is."""

    def take_effect(self) -> None:
        """Put the values of the rehearsal where the graph left its own."""
        with torch.inference_mode(False), torch.no_grad():
            for outcome in self:
                expected, actual = outcome.expected, outcome.actual
                if isinstance(actual, torch.Tensor) and actual.shape == expected.shape:
                    copy_into(actual, expected)


class Segment:
    """The steps of one segment, ready to be rehearsed."""

    def __init__(self, recorded: Recorded, numbers: Sequence[int]) -> None:
        self.numbers = list(numbers)
        self._recorded = recorded
        self._steps = recorded.program.steps
        made = {slot for number in numbers for slot in self._steps[number].writes}
        reads = dict.fromkeys(slot for number in numbers for slot in self._steps[number].reads if slot not in made)
        self._values = {slot: self._value(slot) for slot in reads}
        self._read = _regions(self._values)
        self._regions = [region for region in self._read if self._writers(region)]
        self._last_read = {slot: number for number in numbers for slot in self._steps[number].reads}

    def _value(self, slot: int) -> Any:
        given = self._recorded.given
        return given[slot] if slot in given else self._recorded.constants[slot]

    def rehearse(self, max_bytes: int) -> Rehearsal:
        """Run the steps.

        Args:
            max_bytes: how much of the memory that they write may be copied.

        Raises:
            TooLarge: they write more.
            Exception: what a step raises.
        """
        return self._rehearse(max_bytes, lambda results, others: results)

    def rehearse_nudged(self, max_bytes: int) -> Rehearsal:
        """The same with every result of a step off by about its last bit: how far the outcomes are from those of
        :meth:`rehearse` is what rounding makes of them.

        Raises:
            TooLarge, Exception: as :meth:`rehearse`.
        """
        return self._rehearse(max_bytes, nudged)

    def _rehearse(self, max_bytes: int, disturb: _Disturb) -> Rehearsal:
        outcomes: list[Outcome] = []
        with torch.inference_mode(False), torch.no_grad(), same_random_numbers(self._device()):
            copies = self._copies(max_bytes)
            slots = self._values | copies
            for number in self.numbers:
                outcomes += self._run(number, slots, disturb)
            outcomes += self._states(copies)
        return Rehearsal(sorted(outcomes, key=lambda outcome: outcome.step))

    def arguments(self, number: int, max_bytes: int) -> list[Any]:
        """What step ``number``, the only one of this segment, is called with: copies of what it writes.

        Raises:
            TooLarge: it writes more than ``max_bytes``.
        """
        slots = self._values | self._copies(max_bytes)
        return [slots[slot] for slot in self._steps[number].reads]

    def repeatable(self, max_bytes: int) -> Callable[[], dict[int, Any]]:
        """A function that runs the steps, any number of times, on copies made now; it returns their values by slot.

        Raises:
            TooLarge: they write more than ``max_bytes``.
        """
        given = self._values | self._copies(max_bytes)

        def run() -> dict[int, Any]:
            slots = dict(given)
            for number in self.numbers:
                step = self._steps[number]
                slots.update(zip(step.writes, step.fn(*[slots[slot] for slot in step.reads]), strict=True))
            return slots

        return run

    def keep(self, max_bytes: int) -> Callable[[], None]:
        """Copy what a launch may overwrite of what it reads; the function returned puts it back.

        That is what the steps write, and results of other segments: where their last reader is in this one, their
        memory is used again within it.

        Raises:
            TooLarge: it is more than ``max_bytes``.
        """
        kept = [region for region in self._read if region in self._regions or self._lies_in_pool(region)]
        _check_size(kept, max_bytes)
        copies = [(memory := self._memory(region), memory.clone()) for region in kept]

        def put_back() -> None:
            for memory, copy in copies:
                memory.copy_(copy)

        return put_back

    def _lies_in_pool(self, region: _Region) -> bool:
        recorded = self._recorded
        captured = captured_slots(recorded.program, recorded.layout, self.numbers[0])
        return any(recorded.seen.roots[slot] in captured for slot in region.slots)

    def _memory(self, region: _Region) -> torch.Tensor:
        """The bytes of a region."""
        return bytes_of(self._values[region.slots[0]].untyped_storage(), region.start, region.stop)

    def _run(self, number: int, slots: dict[int, Any], disturb: _Disturb) -> Iterator[Outcome]:
        step, kept = self._steps[number], self._recorded.constants
        results = disturb(step.fn(*[slots[slot] for slot in step.reads]), slots.values())
        for position, (slot, value) in enumerate(zip(step.writes, results, strict=True)):
            slots[slot] = value
            if slot in kept:
                yield Outcome(number, f"result {position}", value, kept[slot])
        for slot in (*step.reads, *step.writes):
            if self._last_read.get(slot, number) == number:
                slots.pop(slot, None)

    def _writers(self, region: _Region) -> list[int]:
        """The steps that write into a region. What they see through a view made in this segment may be any part of the
        storage."""
        roots = self._recorded.seen.roots
        near = {slot for slot in self._values if roots[slot] == roots[region.slots[0]]}
        apart = near.difference(region.slots)
        return [
            number
            for number in self.numbers
            if any(roots[slot] == roots[region.slots[0]] and slot not in apart for slot in self._steps[number].mutates)
        ]

    def _states(self, copied: dict[int, Any]) -> Iterator[Outcome]:
        """What the steps wrote into memory that is not their own, each with the last step that wrote it.

        Memory whose last reader is among them may hold anything by the time that the graph has run.
        """
        over = {slot for number in self.numbers for slot in self._recorded.layout.releases[number]}
        for region in self._regions:
            last = self._writers(region)[-1]
            for slot in [slot for slot in region.slots if slot not in over]:
                yield Outcome(last, f"what it wrote into {self._name(slot)}", copied[slot], self._values[slot])

    def _name(self, slot: int) -> str:
        inputs = self._recorded.program.inputs
        return f"input {inputs[slot].name}" if slot < len(inputs) else f"slot {slot}"

    def _copies(self, max_bytes: int) -> dict[int, Any]:
        """For each slot that is written a tensor of the same layout over a copy of its memory."""
        _check_size(self._regions, max_bytes)
        found: dict[int, Any] = {}
        for region in self._regions:
            copy = self._memory(region).clone()
            found |= {slot: _moved(self._values[slot], copy, region.start) for slot in region.slots}
        return found

    def _device(self) -> torch.device:
        tensors = [value for value in self._values.values() if isinstance(value, torch.Tensor)]
        return next((tensor.device for tensor in tensors if tensor.is_cuda), torch.device("cpu"))


def segments_of(recorded: Recorded) -> list[list[int]]:
    """For each segment the numbers of its steps."""
    groups: list[list[int]] = [[] for _ in recorded.segments]
    for number, segment in enumerate(recorded.layout.segments):
        if segment >= 0:
            groups[segment].append(number)
    return groups


@dataclass(slots=True)
class _Region:
    """Bytes ``start`` to ``stop`` of one storage, and the slots whose tensors lie in them."""

    address: int
    start: int
    stop: int
    slots: list[int]


def _check_size(regions: Sequence[_Region], max_bytes: int) -> None:
    nbytes = sum(region.stop - region.start for region in regions)
    if nbytes > max_bytes:
        limit = f"{max_bytes / 2**20:.0f} MiB"
        raise TooLarge(f"it writes into {nbytes / 2**20:.0f} MiB, and at most {limit} are copied for a comparison")


def _regions(values: Mapping[int, Any]) -> list[_Region]:
    """Sort tensors by memory: what overlaps is in one region. Without those that have no memory."""
    regions: list[_Region] = []
    for address, start, stop, slot in sorted(_extent(slot, value) for slot, value in values.items() if _lies(value)):
        if regions and regions[-1].address == address and start < regions[-1].stop:
            regions[-1].stop = max(regions[-1].stop, stop)
            regions[-1].slots.append(slot)
        else:
            regions.append(_Region(address, start, stop, [slot]))
    return regions


def _lies(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.numel() > 0


def _extent(slot: int, tensor: torch.Tensor) -> tuple[int, int, int, int]:
    """The address of the storage, the first byte in it (rounded down) and the end of a tensor; and the slot."""
    start = int(tensor.storage_offset()) * tensor.element_size()
    return storage_address(tensor), start // _ALIGNMENT * _ALIGNMENT, start + span_bytes(tensor), slot


def _moved(tensor: torch.Tensor, copy: torch.Tensor, start: int) -> torch.Tensor:
    """The same layout over a copy of the storage from byte ``start`` on."""
    item = tensor.element_size()
    return over_storage(copy.untyped_storage(), tensor, (int(tensor.storage_offset()) * item - start) // item)
