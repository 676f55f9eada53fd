"""One plan under comparison: its replays against live runs, from its capture until that is over.

A comparison happens inside of the replay, segment by segment. Before a graph is launched its steps run on copies of
what they write (``rehearsal.py``), and what the graph leaves is compared with that. Live steps run
once, as always. Where the two differ, the values of the live run are put in the place of the graph's before the call
goes on: the call returns what a live one would have, and its effects happen once.

They differ where they are further apart than rounding explains, for which the steps run once more (``rounding.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from graphcap.cudagraph.checks.around import put_around
from graphcap.cudagraph.checks.differences import Difference, difference, same_bits
from graphcap.cudagraph.checks.rehearsal import Outcome, Rehearsal, Segment
from graphcap.cudagraph.checks.rounding import beyond_rounding, spread
from graphcap.cudagraph.program import InputKind
from graphcap.cudagraph.recording.arena import span_bytes
from graphcap.cudagraph.recording.bindings import Binding
from graphcap.cudagraph.recording.recorded import Recorded, describe

if TYPE_CHECKING:
    from graphcap.cudagraph.checks.verify import Checks

_MAX_INPUT_BYTES = 2**20  #: larger inputs are not looked at to tell whether a call has other inputs
_LOOKS = 16  #: replays in a row whose inputs are looked at; later on the 32nd, the 64th and so on


@dataclass(frozen=True, slots=True)
class Divergence:
    """A replay that did not do what a live run did.

    Attributes:
        step: the name of the first step whose values differ.
        what: which of them: ``"result 0"``, ``"what it wrote into input cache"``.
        difference: the rows and the largest gap; ``None`` for a number.
        suspects: operations captured on trust in the segment, up to that step.
    """

    step: str
    what: str
    difference: Difference | None
    suspects: tuple[str, ...]

    def __str__(self) -> str:
        where = f" {self.difference}" if self.difference is not None else ""
        text = f"{self.step}: {self.what} of a replay differs from a live run{where}"
        if not self.suspects:
            return text
        names = self.suspects[0] if len(self.suspects) == 1 else f"one of {', '.join(self.suspects)}"
        return f"{text}; captured on trust: {names}"


class InputsSeen:
    """The inputs of the capturing call, to tell whether a later one brings others."""

    def __init__(self, recorded: Recorded) -> None:
        bindings = recorded.layout.bindings
        watched = [
            (index, stand_in)
            for index, stand_in in recorded.stand_ins.items()
            if index < len(bindings) and _moves(recorded, index) and span_bytes(stand_in) <= _MAX_INPUT_BYTES
        ]
        with torch.inference_mode(False), torch.no_grad():
            self._seen = [(stand_in, stand_in.clone()) for _, stand_in in watched]
        self._looks = 0

    def differ(self) -> bool:
        """Whether the replay that is running now has other inputs; waits for the device. True without any to look at.

        An input that never changes is looked at less often in the long run.
        """
        if not self._seen:
            return True
        self._looks += 1
        if self._looks > _LOOKS and self._looks & (self._looks - 1):
            return False
        return not all(same_bits(stand_in, before) for stand_in, before in self._seen)


def _moves(recorded: Recorded, index: int) -> bool:
    """Whether an input may hold other values on every call."""
    return (
        recorded.layout.bindings[index] in (Binding.COPIED, Binding.COPIED_BACK)
        or recorded.program.inputs[index].kind is InputKind.TENSOR
    )


class PlanCheck:
    """The comparisons of one plan, from its capture until they are over."""

    def __init__(
        self,
        checks: Checks,
        key: Any,
        recorded: Recorded,
        replay: Callable[..., Any],
        groups: list[list[int]],
        checked: list[int],
        remaining: int,
        finished: Callable[[], None],
        seen: InputsSeen | None = None,
    ) -> None:
        self._checks = checks
        self._key = key
        self._groups = groups
        self._first, self._last = checked[0], checked[-1]
        self._remaining = remaining
        self._finished = finished
        self._seen = seen
        self._comparing = self._agreed = False
        self._recorded = recorded
        self._checked = checked
        self._segments: dict[int, Segment] = {}  # those that were rehearsed: most plans of a ladder never are
        self._take_off = put_around(replay, recorded, segment=self._wrap)

    def _wrap(self, number: int, launch: Callable[..., Any]) -> Callable[..., Any]:
        if number not in self._checked:
            return launch

        def compared() -> None:
            if number == self._first:
                self._begin()
            rehearsals = self._rehearse(number) if self._comparing else None
            launch()
            if rehearsals is not None:
                self._compare(number, *rehearsals)
            if number == self._last and self._comparing:
                self._end()

        return compared

    def _begin(self) -> None:
        if self._seen is not None and not any(map(self._checks.unproven, self._groups)):
            self._comparing = False  # another plan has proved it
            self._take_off()
            return
        self._comparing = self._agreed = self._seen is None or self._seen.differ()

    def _rehearse(self, number: int) -> tuple[Rehearsal, Rehearsal] | None:
        """What is to be compared with, and the same with other rounding; twice the same where there is no room."""
        try:
            if number not in self._segments:
                self._segments[number] = Segment(self._recorded, self._groups[number])
            rehearsal = self._segments[number].rehearse(self._checks.spare_bytes())
        except Exception as error:  # the replay itself needs none of this
            self._give_up(number, describe(error))
            return None
        try:
            return rehearsal, self._segments[number].rehearse_nudged(self._checks.spare_bytes())
        except Exception:  # no room for it, mostly
            return rehearsal, rehearsal

    def _compare(self, number: int, rehearsal: Rehearsal, nudged: Rehearsal) -> None:
        try:
            divergence = self._first_divergence(number, rehearsal, nudged)
            if divergence is not None:
                rehearsal.take_effect()
        except Exception as error:
            self._give_up(number, describe(error))
            return
        if divergence is not None:
            self._agreed = False
            trusted = [each for each in self._groups[number] if self._checks.unproven([each])]
            self._checks.report(self._key, divergence, len(divergence.suspects) > 1 and len(trusted) > 1)

    def _first_divergence(self, number: int, rehearsal: Rehearsal, nudged: Rehearsal) -> Divergence | None:
        with torch.inference_mode(False), torch.no_grad():
            for outcome, other in zip(rehearsal, nudged, strict=True):
                agrees, found = _compare_values(outcome, other.expected)
                if not agrees:
                    until = [each for each in self._groups[number] if each <= outcome.step]
                    step = self._checks.program.steps[outcome.step]
                    return Divergence(step.name, outcome.what, found, self._checks.unproven(until))
        return None

    def _give_up(self, number: int, reason: str) -> None:
        self._agreed = False
        self._checks.skip(self._groups[number], reason)

    def _end(self) -> None:
        self._remaining -= 1
        if self._agreed:
            self._checks.prove([each for number in self._checked for each in self._groups[number]])
        if not self._remaining:
            self._take_off()
            self._finished()


def _compare_values(outcome: Outcome, nudged: Any) -> tuple[bool, Difference | None]:
    """Whether the two agree, and for tensors where they do not.

    Raises:
        TooUnsteady: they differ, but so do two live runs.
    """
    expected, actual = outcome.expected, outcome.actual
    if not (isinstance(expected, torch.Tensor) and isinstance(actual, torch.Tensor)):
        return bool(expected == actual), None
    found = difference(expected, actual)
    if found is not None:
        found = beyond_rounding(outcome.what, expected, actual, spread(expected, nudged))
    return found is None, found
