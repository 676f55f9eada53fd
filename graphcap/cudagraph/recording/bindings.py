"""How each input gets into the graph: in place, by copy, by copy there and back, or only to the live steps."""

from __future__ import annotations

import enum
from collections.abc import Collection
from dataclasses import dataclass

from graphcap.cudagraph.program import Capture, InputKind, Program, Step
from graphcap.cudagraph.recording.liveness import mutated_roots
from graphcap.cudagraph.recording.observe import Observation


class Binding(enum.Enum):
    """How one input reaches the captured steps."""

    STATIC = "static"  #: read and written in place; its address is checked on every call
    COPIED = "copied"  #: small and only read: copied into the arena on every call
    COPIED_BACK = "copied in and out"  #: small and written, at an address that keeps moving
    PADDED = "padded"  #: copied into a buffer of the padded size, which every step reads and writes in its place
    REFERENCE = "by reference"  #: read by live steps alone
    VALUE = "value"  #: no tensor


@dataclass(frozen=True, slots=True)
class Choice:
    """What the configuration and earlier calls say about a capture.

    Attributes:
        full: whether FULL steps are captured.
        demoted: steps that failed in a capture, each with the reason.
        unstable: inputs whose address moved too often to be used in place.
        static_args: names of inputs that the user declared static.
        max_copy_bytes: a larger input is never copied.
        uniform_query_len: the tokens of each request, where the plan is for batches in which all have the same number.
        apart: steps that get a segment of their own where they are captured.
        padded: inputs that this capture sees at a padded size.
    """

    full: bool
    demoted: dict[int, str]
    unstable: Collection[int]
    static_args: Collection[str]
    max_copy_bytes: int
    uniform_query_len: int | None = None
    padded: Collection[int] = ()
    apart: Collection[int] = ()


class MemoryFacts:
    """Who writes and mutates which storage."""

    def __init__(self, program: Program, seen: Observation) -> None:
        self.program = program
        self.seen = seen
        self.writer = {slot: index for index, step in enumerate(program.steps) for slot in step.writes}
        self.mutated = mutated_roots(program, seen.roots)
        self.inputs_of: dict[int, list[int]] = {}
        for index in range(len(program.inputs)):
            self.inputs_of.setdefault(seen.roots[index], []).append(index)
        self._readers_of_slot: dict[int, dict[int, None]] = {}
        self._readers_of_root: dict[int, dict[int, None]] = {}
        for number, step in enumerate(program.steps):
            for slot in step.reads:
                self._readers_of_slot.setdefault(slot, {})[number] = None
                self._readers_of_root.setdefault(seen.roots[slot], {})[number] = None

    def readers(self, index: int, live: Collection[int]) -> list[int]:
        """The captured steps that need input ``index`` at a known place: its readers, and when its storage is
        written by any step, the readers of every value in that storage."""
        root = self.seen.roots[index]
        found = self._readers_of_root if root in self.mutated else self._readers_of_slot
        return [number for number in found.get(root if root in self.mutated else index, ()) if number not in live]

    def touched_live(self, root: int, live: Collection[int]) -> bool:
        """Whether a live step reads anything in this storage."""
        return any(number in live for number in self._readers_of_root.get(root, ()))


def bind(facts: MemoryFacts, live: Collection[int], choice: Choice) -> tuple[list[Binding], dict[int, str]]:
    """Decide the binding of every input.

    Args:
        facts: about memory.
        live: the steps that run live.
        choice: what the configuration and earlier calls say.

    Returns:
        The bindings, and the steps that must become live as well, each with the reason; with any of those the
        bindings hold no longer.
    """
    bindings: list[Binding] = []
    evicted: dict[int, str] = {}
    for index, spec in enumerate(facts.program.inputs):
        root = facts.seen.roots[index]
        if index in choice.padded:  # live steps, too, must see the padded tensor
            bindings.append(Binding.PADDED)
            continue
        readers = [] if root < 0 else facts.readers(index, live)
        if not readers:
            bindings.append(Binding.VALUE if root < 0 else Binding.REFERENCE)
            continue
        binding = _bind_one(facts, index, live, choice)
        if binding is None:
            evicted |= dict.fromkeys(readers, f"input {spec.name} keeps moving and cannot be copied")
        bindings.append(binding or Binding.REFERENCE)
    return bindings, evicted


def _bind_one(facts: MemoryFacts, index: int, live: Collection[int], choice: Choice) -> Binding | None:
    spec, root = facts.program.inputs[index], facts.seen.roots[index]
    siblings = facts.inputs_of[root]
    large = facts.seen.nbytes[index] > choice.max_copy_bytes
    if root in facts.mutated:
        if not any(sibling in choice.unstable for sibling in siblings):
            return Binding.STATIC
        alone = len(siblings) == 1 and not facts.touched_live(root, live)
        return Binding.COPIED_BACK if alone and not large else None
    if large or spec.kind is InputKind.STATIC or spec.name in choice.static_args:
        if index not in choice.unstable:
            return Binding.STATIC
        return None if large else Binding.COPIED
    return Binding.COPIED


def is_captured(step: Step, full: bool, uniform_query_len: int | None) -> bool:
    """Whether a step may be part of a graph.

    Args:
        step: the step.
        full: whether split ops are captured.
        uniform_query_len: the tokens of each request, where all requests of the batch have the same number.
    """
    if step.capture is Capture.ALWAYS:
        return True
    if step.capture is Capture.UNIFORM:
        return full and uniform_query_len is not None
    if step.capture is Capture.UNIFORM_SINGLE:
        return full and uniform_query_len == 1
    return full and step.capture is Capture.FULL


def live_from_the_start(program: Program, choice: Choice) -> dict[int, str]:
    """The steps that run live whatever their inputs are, each with the reason."""
    live = dict(choice.demoted)
    for number, step in enumerate(program.steps):
        if not is_captured(step, choice.full, choice.uniform_query_len):
            live.setdefault(number, step.reason or f"capture={step.capture.value}")
    return live
