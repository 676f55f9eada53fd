"""A padded call run step by step with rows that are made up, in which steps of unknown meaning do not take part.

Such a step (a custom op, an ``@graphcap.eager`` function) may write where it likes, a cache that it holds itself for
one, so that it must only ever see the rows of the call. What it did with these is done again in its place.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

from graphcap.cudagraph.padded.corner import corner
from graphcap.cudagraph.program import Capture, Program, Step
from graphcap.cudagraph.recording.liveness import slot_table

#: The sizes of tensors by the number of their slot.
Sizes = Mapping[int, torch.Size]

_Kept = TypeVar("_Kept")


class Outcome(NamedTuple):
    """What a step did: copies of what it returned, and by slot of what it left in values that were made in the call."""

    results: list[Any]
    written: dict[int, torch.Tensor]


class ByStep:
    """Runs the steps of one program for one size of a call and one rung."""

    def __init__(self, program: Program, padded: Sequence[Any]) -> None:
        """Run it with the rows of the call.

        Args:
            program: to be run.
            padded: arguments for the padded call, that the steps may write into.

        Raises:
            Exception: what a step raises.
        """
        self._program = program
        self._outcomes: dict[int, Outcome] = {}
        self._sizes: dict[int, torch.Size] = {}  # of results
        slots = slot_table(program, padded)
        for number, step in enumerate(program.steps):
            results = _run(step, slots)
            if not is_known(step):
                made = [slot for slot in step.mutates if slot >= len(program.inputs)]
                self._outcomes[number] = Outcome(_copies(results), {slot: slots[slot].clone() for slot in made})
            _put(slots, step, results)
            self._sizes |= {slot: slots[slot].shape for slot in step.writes if isinstance(slots[slot], torch.Tensor)}

    def run(
        self, padded: Sequence[Any], exact: Sizes, keep: Callable[[torch.Tensor], _Kept]
    ) -> tuple[dict[int, _Kept], tuple[Any, ...]]:
        """Run it with other rows.

        Args:
            padded: as above.
            exact: the results whose real rows are looked at, with the sizes that they have without padding. Those that
                padding makes no larger have no rows, nor have those whose size is another one from run to run.
            keep: called with the real rows of each, as soon as they are there.

        Returns:
            What ``keep`` made, by slot in the order of the steps, and the outputs of the program.

        Raises:
            Exception: what a step raises.
        """
        kept: dict[int, _Kept] = {}
        slots = slot_table(self._program, padded)
        for number, step in enumerate(self._program.steps):
            done = self._outcomes.get(number)
            _put(slots, step, _run(step, slots) if done is None else _repeat(done, slots))
            for slot in step.writes:
                value, size = slots[slot], self._sizes.get(slot)
                if slot in exact and size is not None and value.shape == size and _is_larger(size, exact[slot]):
                    kept[slot] = keep(corner(value.detach(), exact[slot]))
        outputs = self._program.outputs
        return kept, tuple(slots[slot] if isinstance(slot, int) else slot.value for slot in outputs)


def exact_sizes(program: Program, exact: Sequence[Any], wanted: Collection[int]) -> Sizes:
    """Run a call at its exact size, as far as that is needed; the sizes of the tensors in the wanted slots.

    Raises:
        Exception: what a step raises.
    """
    slots = slot_table(program, exact)
    missing = set(wanted)
    for step in program.steps:
        if not missing:
            break
        _put(slots, step, _run(step, slots))
        missing -= set(step.writes)
    return {slot: slots[slot].shape for slot in wanted if isinstance(slots[slot], torch.Tensor)}


def results(program: Program) -> frozenset[int]:
    """The slots of all results that are whole once they are made. What a later step writes (``out = empty_like(x)``)
    may hold anything until then."""
    made = {slot for step in program.steps for slot in step.writes}
    return frozenset(made - {slot for step in program.steps for slot in step.mutates})


def first_given_away(program: Program) -> frozenset[int]:
    """Those that the first step reads which takes no part. A difference in their rows speaks against padding, whatever
    the outputs say. Further such steps may be given rows in any order: what the first one made is of other rows."""
    first = next((step for step in program.steps if not is_known(step)), None)
    return frozenset() if first is None else results(program) & set(first.reads)


def is_known(step: Step) -> bool:
    """Whether a step consists of operations of torch, which write nothing but what they are given."""
    return step.capture in (Capture.ALWAYS, Capture.FULL) and not step.unproven


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
