"""The plan of a capture, worked out before it begins: what is captured, what runs live, and how values pass between.

Everything here is a pure function of the program, of what a warm-up call showed and of the configuration. Little of it
depends on sizes, so that the rungs of a ladder share one layout (:class:`Layouts`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graphcap.cudagraph.program import InputKind, Program
from graphcap.cudagraph.recording.bindings import Binding, Choice, MemoryFacts, bind, live_from_the_start
from graphcap.cudagraph.recording.liveness import releases
from graphcap.cudagraph.recording.observe import Observation

_MAX_LAYOUTS = 16  #: of one program that are remembered


@dataclass(frozen=True, slots=True)
class Layout:
    """What a capture will do.

    Attributes:
        full: whether FULL steps were to be captured.
        live: the steps that run live, each with the reason.
        bindings: for each input how it reaches the captured steps.
        bridged: results of live steps that are copied to a fixed address for the captured steps that read them.
        fixed: results of live steps that lie in memory which does not move; a replay checks that they still do.
        releases: for each step the slots whose memory ends with it; see ``releases``.
        apart: captured steps that get a segment of their own.
        segments: for each step the number of its segment, counted from 0; live steps have numbers of their own, below
            zero.
        captured: the slots that captured steps write.
        crossing: the results that are read outside of the segment that makes them, outputs included.
        inputs_of: the inputs by their binding, in order.
    """

    full: bool
    live: Mapping[int, str]
    bindings: tuple[Binding, ...]
    bridged: frozenset[int]
    fixed: frozenset[int]
    releases: tuple[tuple[int, ...], ...]
    apart: frozenset[int]
    segments: tuple[int, ...]
    captured: frozenset[int]
    crossing: frozenset[int]
    inputs_of: Mapping[Binding, tuple[int, ...]]

    def inputs_bound(self, *bindings: Binding) -> list[int]:
        """The inputs with one of these bindings."""
        if len(bindings) == 1:
            return list(self.inputs_of.get(bindings[0], ()))
        return sorted(index for binding in bindings for index in self.inputs_of.get(binding, ()))


class Layouts:
    """The layouts of one program, each worked out once."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._known: list[tuple[tuple[Any, ...], Layout]] = []

    def of(self, seen: Observation, choice: Choice) -> Layout:
        """As :func:`lay_out`. Sizes count only in so far as they make an input too large to be copied."""
        large = tuple(index for index, nbytes in enumerate(seen.nbytes) if nbytes > choice.max_copy_bytes)
        asked = choice, large, seen.roots, dict(seen.foreign)
        for before, layout in self._known:
            if before == asked:
                return layout
        layout = lay_out(self._program, seen, choice)
        self._known = [(asked, layout), *self._known[: _MAX_LAYOUTS - 1]]
        return layout


def lay_out(program: Program, seen: Observation, choice: Choice) -> Layout:
    """Work out a capture. A step that cannot be captured becomes live, which may pull others along."""
    facts = MemoryFacts(program, seen)
    live = live_from_the_start(program, choice)
    while True:
        bindings, evicted = bind(facts, live, choice)
        evicted = _unfit(facts, live) | evicted
        bridged, fixed, stale = _crossings(facts, live, bindings)
        evicted |= stale
        if not evicted:
            break
        live |= evicted
    apart = frozenset(choice.apart).difference(live)
    segments = _segments(len(program.steps), live, apart)
    inputs_of = {each: tuple(index for index, found in enumerate(bindings) if found is each) for each in Binding}
    return Layout(
        choice.full,
        live,
        tuple(bindings),
        frozenset(bridged),
        frozenset(fixed),
        releases(program, seen.roots),
        apart,
        segments,
        frozenset(slot for number, step in enumerate(program.steps) if number not in live for slot in step.writes),
        _crossing_slots(program, segments),
        inputs_of,
    )


def _segments(num_steps: int, live: Mapping[int, str], apart: frozenset[int]) -> tuple[int, ...]:
    segments: list[int] = []
    current = -1
    for number in range(num_steps):
        if number in live:
            segments.append(-number - 1)
            continue
        current += number == 0 or number - 1 in live or not apart.isdisjoint((number - 1, number))
        segments.append(current)
    return tuple(segments)


def _crossing_slots(program: Program, segments: Sequence[int]) -> frozenset[int]:
    made_in = {slot: segments[number] for number, step in enumerate(program.steps) for slot in step.writes}
    crossing = {each for each in program.outputs if isinstance(each, int)}
    for number, step in enumerate(program.steps):
        crossing |= {slot for slot in step.reads if made_in.get(slot) != segments[number]}
    return frozenset(crossing)


def _unfit(facts: MemoryFacts, live: Mapping[int, str]) -> dict[int, str]:
    """Captured steps that touch what a graph cannot hold."""
    evicted: dict[int, str] = {}
    for number, step in enumerate(facts.program.steps):
        for slot in () if number in live else (*step.reads, *step.writes):
            if slot in facts.seen.foreign:
                evicted.setdefault(number, f"{_name(facts.program, slot)} {facts.seen.foreign[slot]}")
            elif facts.seen.roots[slot] < 0 and _varies(facts, slot, live):
                evicted.setdefault(number, f"{_name(facts.program, slot)} is a number that the key does not fix")
    return evicted


def _varies(facts: MemoryFacts, slot: int, live: Mapping[int, str]) -> bool:
    """Whether a value that is no tensor may differ between two calls with the same key."""
    if slot < len(facts.program.inputs):
        spec = facts.program.inputs[slot]
        return spec.kind is InputKind.SCALAR and not spec.in_key
    return facts.writer[slot] in live


def _crossings(
    facts: MemoryFacts, live: Mapping[int, str], bindings: list[Binding]
) -> tuple[set[int], set[int], dict[int, str]]:
    """Sort the results of live steps that static memory depends on into bridged and fixed.

    Returns:
        The bridged slots, the fixed slots, and captured steps that must become live, each with the reason: a copy
        would hide from them what is written into the original.
    """
    bridged: set[int] = set()
    fixed: set[int] = set()
    evicted: dict[int, str] = {}
    returned = {slot for slot in facts.program.outputs if isinstance(slot, int)}
    for number in live:
        for slot in facts.program.steps[number].writes:
            root = facts.seen.roots[slot]
            readers = [n for n, step in enumerate(facts.program.steps) if n not in live and slot in step.reads]
            if root < 0 or not (readers or slot in returned):
                continue
            of_live_step = facts.writer.get(root) in live
            if _stays_put(facts, root, of_live_step, bindings):
                if readers or root >= len(facts.program.inputs) or _given_by_plan(facts, number, root, live):
                    fixed.add(slot)
            elif not readers:
                if not of_live_step and _given_by_plan(facts, number, root, live):
                    fixed.add(slot)
            elif of_live_step and root in facts.mutated:
                evicted |= dict.fromkeys(readers, f"{_name(facts.program, slot)} is written in place after it was made")
            else:
                bridged.add(slot)
    return bridged, fixed, evicted


def _stays_put(facts: MemoryFacts, root: int, of_live_step: bool, bindings: list[Binding]) -> bool:
    """Whether a storage has the same address in every replay."""
    if root < len(facts.program.inputs):
        return all(bindings[index] in (Binding.STATIC, Binding.PADDED) for index in facts.inputs_of[root])
    return not of_live_step


def _given_by_plan(facts: MemoryFacts, number: int, root: int, live: Mapping[int, str]) -> bool:
    """Whether a live step is handed a captured view of this input, which is not the caller's tensor."""
    reads = facts.program.steps[number].reads
    return any(facts.seen.roots[slot] == root and facts.writer.get(slot, number) not in live for slot in reads)


def _name(program: Program, slot: int) -> str:
    if slot < len(program.inputs):
        return f"input {program.inputs[slot].name}"
    writer = next(step for step in program.steps if slot in step.writes)
    return f"result {writer.writes.index(slot)} of {writer.name}"
