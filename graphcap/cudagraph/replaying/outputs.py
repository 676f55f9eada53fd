"""What a plan hands back: for what lies in static memory a copy or what ``Config.outputs`` says (see
:mod:`graphcap.cudagraph.replaying.handout`), the caller's own tensors for what is or views them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphcap.cudagraph.private import bytes_of, storage_address, weak_view
from graphcap.cudagraph.program import Constant
from graphcap.cudagraph.recording.arena import overlaps_itself, span_bytes
from graphcap.cudagraph.recording.observe import Observation
from graphcap.cudagraph.replaying.generations import Generations
from graphcap.cudagraph.replaying.handout import HandOut

_WORD = 16  #: bytes; a copy of several values begins at a multiple of it, so that each stays aligned for its dtype


@dataclass(frozen=True, slots=True)
class AsIs:
    """The value in the slot: an argument, a number, a fresh result of a live step."""

    slot: int


@dataclass(frozen=True, slots=True)
class View:
    """A view of the value in slot ``base``, made by ``make(slots[base])``."""

    base: int
    make: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Rehomed:
    """What a live step made of memory that it saw through a value of the plan, as a view of slot ``base``, its owner.

    Without that the result would point into memory that nothing keeps alive once the caller drops the owner.
    ``stand_in`` is what stood for the owner, at the same distance. The size is the result's own: it may vary. The live
    step may return one object for several results: ``before`` are those of the same owner that are made earlier.
    """

    slot: int
    base: int
    stand_in: torch.Tensor
    before: tuple[int, ...] = ()

    def make(self, value: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """The same elements, owned by ``base``; ``base`` itself where that is what the live step returned."""
        return value if value is base else _view_maker(value, self.stand_in, value.requires_grad)(base)


@dataclass(frozen=True, slots=True)
class Clone:
    """A part of what is handed out for block number ``block``, made by ``part(copy)``; ``None`` is all of it."""

    block: int
    part: Callable[[torch.Tensor], torch.Tensor] | None


@dataclass(frozen=True, slots=True)
class OutputPlan:
    """How the outputs are made.

    Attributes:
        order: per output the slot whose maker gives it, or a constant. A slot that occurs twice is one object.
        makers: per slot how its value leaves the plan.
        blocks: static memory to copy, each with one ``clone()`` unless it is handed out in another way.
        hand_out: that other way.
        in_place: whether ``hand_out`` gives the static memory itself, so that replays write into it as they run.
        generations: told what is handed out and when it ends, where that is checked.
    """

    order: tuple[int | Constant, ...]
    makers: Mapping[int, AsIs | View | Rehomed | Clone]
    blocks: tuple[torch.Tensor, ...]
    hand_out: HandOut | None = None
    in_place: bool = False
    generations: Generations | None = None

    def lent(self) -> set[int]:
        """The storages of the plan that outputs lie in."""
        return {storage_address(block) for block in self.blocks} - {0} if self.in_place else set()

    def collect(self, slots: Sequence[Any]) -> tuple[Any, ...]:
        """The outputs of one call."""
        copies = (
            [block.clone() for block in self.blocks] if self.hand_out is None else self.hand_out.over(self.blocks)()
        )
        made: dict[int, Any] = {}
        for slot, maker in self.makers.items():
            if isinstance(maker, AsIs):
                made[slot] = slots[maker.slot]
            elif isinstance(maker, View):
                made[slot] = maker.make(slots[maker.base])
            elif isinstance(maker, Rehomed):
                value = slots[maker.slot]
                twin = next((made[each] for each in maker.before if slots[each] is value), None)
                made[slot] = maker.make(value, slots[maker.base]) if twin is None else twin
            else:
                made[slot] = maker.part(copies[maker.block]) if maker.part else copies[maker.block]
        if self.generations is not None:
            self.generations.hand_out([made[slot] for slot, maker in self.makers.items() if isinstance(maker, Clone)])
        return tuple(each.value if isinstance(each, Constant) else made[each] for each in self.order)

    def uncopied(self) -> OutputPlan:
        """The same without a copy, for a plan that will never run again: the outputs own the memory they lie in."""
        makers = {slot: AsIs(slot) if isinstance(maker, Clone) else maker for slot, maker in self.makers.items()}
        return OutputPlan(self.order, makers, ())


@dataclass(frozen=True, slots=True)
class StaticMemory:
    """The memory of one plan, by the address of the storage.

    Attributes:
        homes: memory that stands for a value of the call: the slot of that value, and the tensor that stands for it.
        pool: memory of recorded results.
    """

    homes: dict[int, tuple[int, torch.Tensor]]
    pool: set[int]

    def home_of(self, address: int, slot: int) -> tuple[int, torch.Tensor | None]:
        """The other slot whose value this memory stands for, and its stand-in; ``slot`` and None if there is none."""
        base, stand_in = self.homes.get(address, (slot, None))
        return (base, stand_in) if address and base != slot else (slot, None)


def plan_outputs(
    outputs: Sequence[int | Constant],
    seen: Observation,
    slots: Sequence[Any],
    recorded: Collection[int],
    borrowed: Collection[int],
    memory: StaticMemory,
) -> OutputPlan:
    """Decide how each output leaves the plan.

    Args:
        outputs: the program's.
        seen: what a warm-up showed.
        slots: the values of one call.
        recorded: the slots whose values a captured step made.
        borrowed: the slots whose values a live step may have made of one of those, without copying.
        memory: the plan's.
    """
    order = tuple(
        each if isinstance(each, Constant) else _giver(each, seen.identity, slots, recorded, memory) for each in outputs
    )
    makers: dict[int, AsIs | View | Rehomed | Clone] = {}
    inside: dict[int, list[int]] = {}
    for slot in dict.fromkeys(each for each in order if isinstance(each, int)):
        value = slots[slot]
        address = storage_address(value) if isinstance(value, torch.Tensor) else 0
        base, stand_in = memory.home_of(address, slot)
        if stand_in is not None and (slot in recorded or storage_address(slots[base]) != address):
            makers[slot] = View(base, _view_maker(value, stand_in, slot in seen.needing_grad))
        elif stand_in is not None and slot in borrowed:
            twins = (each for each in makers.values() if isinstance(each, Rehomed) and each.base == base)
            makers[slot] = Rehomed(slot, base, stand_in, tuple(each.slot for each in twins))
        elif isinstance(value, torch.Tensor) and (slot in recorded or address in memory.pool):
            inside.setdefault(address or -slot - 1, []).append(slot)
        else:
            makers[slot] = AsIs(slot)
    blocks: list[torch.Tensor] = []
    for sharers in inside.values():
        makers |= _clone_makers({slot: slots[slot] for slot in sharers}, len(blocks))
        blocks.append(_block([slots[slot] for slot in sharers]))
    return OutputPlan(order, makers, tuple(blocks))


def _giver(
    slot: int, identity: Sequence[int], slots: Sequence[Any], recorded: Collection[int], memory: StaticMemory
) -> int:
    """The slot whose maker gives this output.

    A live step may return its argument in one call and something else in the next, so its result stands for itself,
    unless it lies in memory of the plan or is an object that the plan had handed to it.
    """
    same, value = identity[slot], slots[slot]
    if slot in recorded or any(value is slots[each] for each in recorded if identity[each] == same):
        return same
    address = storage_address(value) if isinstance(value, torch.Tensor) else 0
    base, stand_in = memory.home_of(address, slot)
    elsewhere = stand_in is not None and storage_address(slots[base]) != address
    return same if elsewhere or address in memory.pool else slot


def _view_maker(
    value: torch.Tensor, stand_in: torch.Tensor, needs_grad: bool
) -> Callable[[torch.Tensor], torch.Tensor]:
    """How to get from an argument to the view of it that ``value`` is of ``stand_in``."""
    size, stride, dtype, item = value.size(), value.stride(), value.dtype, value.element_size()
    distance = value.storage_offset() * item - stand_in.storage_offset() * stand_in.element_size()

    def same_dtype(base: torch.Tensor) -> torch.Tensor:
        return base.as_strided(size, stride, base.storage_offset() + distance // item)

    def other_dtype(base: torch.Tensor) -> torch.Tensor:
        offset = (base.storage_offset() * base.element_size() + distance) // item
        empty = torch.empty(0, dtype=dtype, device=base.device)
        return empty.set_(base.untyped_storage(), offset, size, stride)

    make = same_dtype if dtype is stand_in.dtype else other_dtype
    # A view of a parameter requires grad also under no_grad; what was detached from it before must not.
    return make if needs_grad else lambda base: make(base).detach() if base.requires_grad else make(base)


def _block(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """The memory that the copy of these values takes: the only value itself, or all the bytes from first to last."""
    if _alone(values):
        return weak_view(values[0])
    start, stop = _reach(values)
    return bytes_of(weak_view(values[0]).untyped_storage(), start, stop)


def _alone(values: Sequence[torch.Tensor]) -> bool:
    value = values[0]
    dense = span_bytes(value) == value.numel() * value.element_size() and not overlaps_itself(value)
    return len(values) == 1 and dense


def _reach(values: Sequence[torch.Tensor]) -> tuple[int, int]:
    """First and last byte within the storage, the first rounded down to a whole word."""
    starts = [int(value.storage_offset()) * value.element_size() for value in values]
    stops = [start + span_bytes(value) for start, value in zip(starts, values, strict=True)]
    return min(starts) // _WORD * _WORD, max(stops)


def _clone_makers(values: Mapping[int, torch.Tensor], block: int) -> dict[int, Clone]:
    held = list(values.values())
    if _alone(held):
        return {slot: Clone(block, None) for slot in values}
    start, _ = _reach(held)
    return {slot: Clone(block, _part_maker(value, start)) for slot, value in values.items()}


def _part_maker(value: torch.Tensor, start: int) -> Callable[[torch.Tensor], torch.Tensor]:
    size, stride, dtype = value.size(), value.stride(), value.dtype
    first = value.storage_offset() * value.element_size() - start
    last = first + span_bytes(value)

    def part(copy: torch.Tensor) -> torch.Tensor:
        return copy[first:last].view(dtype).as_strided(size, stride)

    return part
