"""Replays compared with live runs: all of them where ``verify=`` asks for it, and once what is captured on trust.

A graph holds what its operations read in Python when they were recorded. Compiled pieces and torch's own operations
are known to read nothing of the kind. For a custom op that was declared capturable, and for a user's Triton kernel,
there is only somebody's word. So the first replay of these on other inputs than those of the capture is compared with a
live run. What differs runs live from then on, and an error names it. Where several of them are in the graph that
differs, they are captured again, each in a graph of its own, to find the one.

A comparison happens inside of the replay, segment by segment. Before a graph is launched its steps run on copies of
what they write (:mod:`~graphcap.cudagraph.rehearsal`), and what the graph leaves is compared with that. Live steps run
once, as always. Where the two differ, the values of the live run are put in the place of the graph's before the call
goes on: the call returns what a live one would have, and its effects happen once.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from graphcap.cudagraph.arena import span_bytes
from graphcap.cudagraph.around import put_around
from graphcap.cudagraph.bindings import Binding
from graphcap.cudagraph.differences import Difference, difference, same_bits
from graphcap.cudagraph.phase import captures_allowed
from graphcap.cudagraph.program import InputKind, Program
from graphcap.cudagraph.recorded import Recorded, describe
from graphcap.cudagraph.rehearsal import Outcome, Rehearsal, Segment, segments_of
from graphcap.cudagraph.stats import RunnerStats

_log = logging.getLogger("graphcap.cudagraph")

_MAX_INPUT_BYTES = 2**20  #: larger inputs are not looked at to tell whether a call has other inputs
_LOOKS = 64  #: replays in a row whose inputs are looked at; later on every 16th
_LOOK_EVERY = 16
_TRIALS = 32  #: replays compared to find the one of several suspects; then all of them are taken for guilty


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


class Inspector(Protocol):
    """What may look into the replays of a region."""

    def apart(self, key: Any) -> Collection[int]:
        """The steps that a capture for this key gives a segment of their own."""

    def attach(self, key: Any, recorded: Recorded, replay: Callable[..., Any]) -> None:
        """A plan has been captured: wrap what its replay calls."""


class Checks:
    """Which replays of one region are compared, and what came of it."""

    def __init__(
        self,
        program: Program,
        verify: bool | int,
        stats: RunnerStats,
        distrust: Callable[[Mapping[int, str]], None],
        finished: Callable[[Any], None],
        spare_bytes: Callable[[], int],
    ) -> None:
        """Nothing is compared before a plan is attached. The methods of the maker are held weakly.

        Args:
            program: the region.
            verify: as in the configuration: every replay (True), the first N of each plan, or only what must be.
            stats: where divergences are noted.
            distrust: told of steps that must run live from now on, each with the reason.
            finished: told the key of a plan that ``verify`` is done with; it may be captured anew, without the cuts.
            spare_bytes: how much the device can spare for copies; a segment that writes more is not compared.
        """
        self.program = program
        self.stats = stats
        self.proven: set[str] = set()
        self.spare_bytes = spare_bytes
        self._wanted = 2**62 if verify is True else int(verify)
        self._distrust = weakref.WeakMethod(distrust)
        self._finished = weakref.WeakMethod(finished)
        self._done: set[Any] = set()
        self._suspects: dict[str, Divergence] = {}

    def apart(self, key: Any) -> Collection[int]:
        """Every step where the values of each are to be compared; else those with suspects that are to be told
        apart."""
        return range(len(self.program.steps)) if self._verifies(key) else self._steps_with(self._suspects)

    def _verifies(self, key: Any) -> bool:
        return bool(self._wanted) and key not in self._done

    def _steps_with(self, names: Collection[str]) -> list[int]:
        return [n for n, step in enumerate(self.program.steps) if not set(names).isdisjoint(step.unproven)]

    def attach(self, key: Any, recorded: Recorded, replay: Callable[..., Any]) -> None:
        """Have the next replays of a plan compared, if there is a reason to."""
        try:
            self._attach(key, recorded, replay, segments_of(recorded))
        except Exception as error:  # the plan itself needs none of this
            self.skip(range(len(self.program.steps)), describe(error))

    def _attach(self, key: Any, recorded: Recorded, replay: Callable[..., Any], groups: list[list[int]]) -> None:
        if self._verifies(key):
            everything = list(range(len(groups)))
            _PlanCheck(self, key, recorded, replay, groups, everything, self._wanted, lambda: self._finish(key))
            return
        trusted = [n for n, steps in enumerate(groups) if self.unproven(steps)]
        if recorded.layout.apart:
            _PlanCheck(self, key, recorded, replay, groups, trusted, _TRIALS, self._give_up_trial)
        elif trusted:
            steps = [number for n in trusted for number in groups[n]]
            self.skip(steps, "no replay had other inputs than the capture yet")
            _PlanCheck(self, key, recorded, replay, groups, trusted, 1, lambda: None, InputsSeen(recorded))

    def unproven(self, numbers: Collection[int]) -> tuple[str, ...]:
        """The operations in these steps that are captured on trust."""
        names = dict.fromkeys(name for number in numbers for name in self.program.steps[number].unproven)
        return tuple(name for name in names if name not in self.proven)

    def report(self, key: Any, divergence: Divergence, can_be_told_apart: bool) -> None:
        """Note a divergence of the plan ``key``. What is suspected runs live from now on, wherever it occurs; without
        suspects the step."""
        self.stats.divergences.append(str(divergence))
        _log.error("%s: %s", self.program.name, divergence)
        for name in divergence.suspects:
            self.stats.unchecked.pop(name, None)
        finished = self._finished()
        if can_be_told_apart and finished is not None and captures_allowed():
            self._suspects |= dict.fromkeys(divergence.suspects, divergence)
            finished(key)
            return
        steps = self._steps_with(divergence.suspects) or [
            number for number, step in enumerate(self.program.steps) if step.name == divergence.step
        ]
        self._convict(dict.fromkeys(steps, str(divergence)))

    def _give_up_trial(self) -> None:
        """The guilty one of several suspects did not show itself again: none of them may stay."""
        found = [(n, self.program.steps[n].unproven) for n in self._steps_with(self._suspects)]
        suspects = self._suspects
        self._convict({n: str(suspects[name]) for n, names in found for name in names if name in suspects})

    def _convict(self, steps: Mapping[int, str]) -> None:
        """These steps run live from now on. Others that were suspected are not any more: their plans are checked as
        if they were new."""
        self._suspects = {}
        if (distrust := self._distrust()) is not None:
            distrust(steps)

    def skip(self, numbers: Collection[int], reason: str) -> None:
        """Note why a segment could not be compared."""
        names = self.unproven(numbers) or tuple(self.program.steps[number].name for number in numbers)
        self.stats.unchecked |= dict.fromkeys(names, reason)

    def prove(self, numbers: Collection[int]) -> None:
        """These steps replayed as they run live."""
        for name in self.unproven(numbers):
            if name in self._suspects:  # once is not enough for these
                continue
            self.proven.add(name)
            self.stats.unchecked.pop(name, None)

    def _finish(self, key: Any) -> None:
        self._done.add(key)
        if captures_allowed() and (finished := self._finished()) is not None:
            finished(key)


class InputsSeen:
    """The inputs of the capturing call, to tell whether a later one brings others."""

    def __init__(self, recorded: Recorded) -> None:
        bindings = recorded.layout.bindings
        watched = [
            (index, stand_in)
            for index, stand_in in recorded.stand_ins.items()
            if index < len(bindings) and span_bytes(stand_in) <= _MAX_INPUT_BYTES and _moves(recorded, index)
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
        if self._looks > _LOOKS and self._looks % _LOOK_EVERY:
            return False
        return not all(same_bits(stand_in, before) for stand_in, before in self._seen)


def _moves(recorded: Recorded, index: int) -> bool:
    """Whether an input may hold other values on every call."""
    return (
        recorded.layout.bindings[index] in (Binding.COPIED, Binding.COPIED_BACK)
        or recorded.program.inputs[index].kind is InputKind.TENSOR
    )


class _PlanCheck:
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
        self._segments = {number: Segment(recorded, groups[number]) for number in checked}
        self._take_off = put_around(replay, recorded, segment=self._wrap)

    def _wrap(self, number: int, launch: Callable[..., Any]) -> Callable[..., Any]:
        if number not in self._segments:
            return launch

        def compared() -> None:
            if number == self._first:
                self._begin()
            rehearsal = self._rehearse(number) if self._comparing else None
            launch()
            if rehearsal is not None:
                self._compare(number, rehearsal)
            if number == self._last and self._comparing:
                self._end()

        return compared

    def _begin(self) -> None:
        if self._seen is not None and not any(map(self._checks.unproven, self._groups)):
            self._comparing = False  # another plan has proved it
            self._take_off()
            return
        self._comparing = self._agreed = self._seen is None or self._seen.differ()

    def _rehearse(self, number: int) -> Rehearsal | None:
        try:
            return self._segments[number].rehearse(self._checks.spare_bytes())
        except Exception as error:  # the replay itself needs none of this
            self._give_up(number, describe(error))
            return None

    def _compare(self, number: int, rehearsal: Rehearsal) -> None:
        try:
            divergence = self._first_divergence(number, rehearsal)
            if divergence is not None:
                rehearsal.take_effect()
        except Exception as error:
            self._give_up(number, describe(error))
            return
        if divergence is not None:
            self._agreed = False
            trusted = [each for each in self._groups[number] if self._checks.unproven([each])]
            self._checks.report(self._key, divergence, len(divergence.suspects) > 1 and len(trusted) > 1)

    def _first_divergence(self, number: int, rehearsal: Rehearsal) -> Divergence | None:
        with torch.inference_mode(False), torch.no_grad():
            for outcome in rehearsal:
                agrees, found = _compare_values(outcome)
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
            self._checks.prove([each for number in self._segments for each in self._groups[number]])
        if not self._remaining:
            self._take_off()
            self._finished()


def _compare_values(outcome: Outcome) -> tuple[bool, Difference | None]:
    expected, actual = outcome.expected, outcome.actual
    if isinstance(expected, torch.Tensor) and isinstance(actual, torch.Tensor):
        found = difference(expected, actual)
        return found is None, found
    return bool(expected == actual), None
