"""A padded call run step by step with rows that are made up, in which steps of unknown meaning do not take part.

Such a step (a custom op, an ``@graphcap.eager`` function) may write where it likes, a cache that it holds itself for
one, so that it must only ever see the rows of the call. What it did with these is done again in its place.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from graphcap.cudagraph.padded.corner import corner
from graphcap.cudagraph.program import Capture, Program, Step
from graphcap.cudagraph.recording.liveness import num_slots

_RESULT = " result "


class Outcome(NamedTuple):
    """What a step did: copies of what it returned, and by slot of what it left in values that were made in the call."""

    results: list[Any]
    written: dict[int, torch.Tensor]


class ByStep:
    """Runs the steps of one program for one size of a call and one rung."""

    def __init__(self, program: Program, exact: Mapping[int, torch.Size], padded: Sequence[Any]) -> None:
        """Run it with the rows of the call.

        Args:
            program: to be run.
            exact: what :func:`sizes_of_results` says about the call at its exact size.
            padded: arguments for the padded one, that the steps may write into.

        Raises:
            Exception: what a step raises.
        """
        self._program = program
        self._outcomes: dict[int, Outcome] = {}
        self._sizes: dict[int, torch.Size] = {}  # of the results that have other sizes when padded: those with rows
        slots = _slots(program, padded)
        for number, step in enumerate(program.steps):
            results = _run(step, slots)
            if not is_known(step):
                made = [slot for slot in step.mutates if slot >= len(program.inputs)]
                self._outcomes[number] = Outcome(_copies(results), {slot: slots[slot].clone() for slot in made})
            _put(slots, step, results)
        written = {
            slot for step in program.steps for slot in step.mutates
        }  # until then it may hold anything: empty_like
        for slot, value in enumerate(slots[len(padded) :], len(padded)):
            size = exact.get(slot) if slot not in written else None
            if size is not None and isinstance(value, torch.Tensor) and _is_larger(value.shape, size):
                self._sizes[slot] = size
        first = next((step for step in program.steps if not is_known(step)), None)
        read = self._sizes.keys() & set(() if first is None else first.reads)
        self._names = {slot: f"{step.name}{_RESULT}{i}" for step in program.steps for i, slot in enumerate(step.writes)}
        self._decisive = {self._names[slot] for slot in read}

    def is_decisive(self, name: str) -> bool:
        """Whether a difference in the rows of this name speaks against padding, whatever the outputs say: the first
        step that does not take part would read them. Further ones may be given rows in any order."""
        return name in self._decisive

    def run(self, padded: Sequence[Any]) -> tuple[dict[str, torch.Tensor], tuple[Any, ...]]:
        """The real rows of what each step makes, by the name of the step, and the outputs of the program."""
        rows: dict[str, torch.Tensor] = {}
        slots = _slots(self._program, padded)
        for number, step in enumerate(self._program.steps):
            done = self._outcomes.get(number)
            _put(slots, step, _run(step, slots) if done is None else _repeat(done, slots))
            for slot in step.writes:
                if slot in self._sizes and isinstance(slots[slot], torch.Tensor):
                    rows[self._names[slot]] = corner(slots[slot].detach(), self._sizes[slot]).cpu().clone()
        outputs = self._program.outputs
        return rows, tuple(slots[slot] if isinstance(slot, int) else slot.value for slot in outputs)


def sizes_of_results(program: Program, exact: Sequence[Any]) -> dict[int, torch.Size]:
    """Run a call at its exact size; the size of the tensor in each slot.

    Raises:
        Exception: what a step raises.
    """
    slots = _slots(program, exact)
    for step in program.steps:
        _put(slots, step, _run(step, slots))
    return {slot: value.shape for slot, value in enumerate(slots) if isinstance(value, torch.Tensor)}


def is_known(step: Step) -> bool:
    """Whether a step consists of operations of torch, which write nothing but what they are given."""
    return step.capture in (Capture.ALWAYS, Capture.FULL) and not step.unproven


def step_of(name: str) -> str:
    """The step whose rows have this name, ``""`` for what are no rows of a step."""
    step, is_row, _ = name.partition(_RESULT)
    return step if is_row else ""


def _slots(program: Program, args: Sequence[Any]) -> list[Any]:
    return [*args, *[None] * (num_slots(program) - len(args))]


def _is_larger(size: torch.Size, other: torch.Size) -> bool:
    return len(size) == len(other) and size != other and all(map(operator.ge, size, other))


def _run(step: Step, slots: Sequence[Any]) -> Sequence[Any]:
    results: Sequence[Any] = step.fn(*[slots[slot] for slot in step.reads])
    return results


def _repeat(done: Outcome, slots: Sequence[Any]) -> Sequence[Any]:
    for slot, content in done.written.items():
        slots[slot].copy_(content)
    return _copies(done.results)


def _put(slots: list[Any], step: Step, results: Sequence[Any]) -> None:
    for slot, value in zip(step.writes, results, strict=True):
        slots[slot] = value


def _copies(values: Sequence[Any]) -> list[Any]:
    return [value.clone() if isinstance(value, torch.Tensor) else value for value in values]
