"""Replays compared with live runs: all of them where ``verify=`` asks for it, and once what is captured on trust.

A graph holds what its operations read in Python when they were recorded. Compiled pieces and torch's own operations
are known to read nothing of the kind. For a custom op that was declared capturable, and for a user's Triton kernel,
there is only somebody's word. So the first replay of these on other inputs than those of the capture is compared with a
live run. What differs runs live from then on, and an error names it. Where several of them are in the graph that
differs, they are captured again, each in a graph of its own, to find the one.

Which replays are compared, and what follows from it, is decided here; how one plan is compared is in
:mod:`~graphcap.cudagraph.checks.plan_check`.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

from graphcap.cudagraph.checks.plan_check import Divergence, InputsSeen, PlanCheck
from graphcap.cudagraph.checks.rehearsal import segments_of
from graphcap.cudagraph.counters.stats import RunnerStats
from graphcap.cudagraph.dispatch.phase import captures_allowed
from graphcap.cudagraph.program import Program
from graphcap.cudagraph.recording.recorded import Recorded, describe

_log = logging.getLogger("graphcap.cudagraph")

_TRIALS = 32  #: replays compared to find the one of several suspects; then all of them are taken for guilty


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
        why_not: str = "",
    ) -> None:
        """Nothing is compared before a plan is attached. The methods of the maker are held weakly.

        Args:
            program: the region.
            verify: as in the configuration: every replay (True), the first N of each plan, or only what must be.
            stats: where divergences are noted.
            distrust: told of steps that must run live from now on, each with the reason.
            finished: told the key of a plan that ``verify`` is done with; it may be captured anew, without the cuts.
            spare_bytes: how much the device can spare for copies; a segment that writes more is not compared.
            why_not: why nothing is ever compared, if that is so. What should have been is noted with it.
        """
        self.program = program
        self.stats = stats
        self.proven: set[str] = set()
        self.spare_bytes = spare_bytes
        self._why_not = why_not
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
        return bool(self._wanted) and not self._why_not and key not in self._done

    def _steps_with(self, names: Collection[str]) -> list[int]:
        return [n for n, step in enumerate(self.program.steps) if not set(names).isdisjoint(step.unproven)]

    def attach(self, key: Any, recorded: Recorded, replay: Callable[..., Any]) -> None:
        """Have the next replays of a plan compared, if there is a reason to."""
        everything = range(len(self.program.steps))
        if self._why_not:
            if self._wanted or self.unproven(everything):
                self.skip(everything, self._why_not)
            return
        try:
            self._attach(key, recorded, replay, segments_of(recorded))
        except Exception as error:  # the plan itself needs none of this
            self.skip(everything, describe(error))

    def _attach(self, key: Any, recorded: Recorded, replay: Callable[..., Any], groups: list[list[int]]) -> None:
        if self._verifies(key):
            everything = list(range(len(groups)))
            PlanCheck(self, key, recorded, replay, groups, everything, self._wanted, lambda: self._finish(key))
            return
        trusted = [n for n, steps in enumerate(groups) if self.unproven(steps)]
        if recorded.layout.apart:
            PlanCheck(self, key, recorded, replay, groups, trusted, _TRIALS, self._give_up_trial)
        elif trusted:
            steps = [number for n in trusted for number in groups[n]]
            self.skip(steps, "no replay had other inputs than the capture yet")
            PlanCheck(self, key, recorded, replay, groups, trusted, 1, lambda: None, InputsSeen(recorded))

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
