"""What is remembered about calls that have no plan: how often a route was seen, what failed, what was refused."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Hashable, Iterable

from graphcap.config import Config
from graphcap.cudagraph.counters.stats import RunnerStats
from graphcap.cudagraph.dispatch.phase import captures_allowed
from graphcap.cudagraph.dispatch.revision import revise
from graphcap.cudagraph.dispatch.route import Route
from graphcap.cudagraph.program import Program
from graphcap.cudagraph.recording.recorded import Failure

_log = logging.getLogger("graphcap.cudagraph")

_MAX_FAILURES = 2  #: failed captures after which a region runs without new graphs
_MAX_KEYS = 65536  #: sightings remembered


class Attempts:
    """Decides when a route is captured, and whether at all.

    Attributes:
        demoted: steps that failed in a capture, each with the reason.
        lost: the keys of routes whose plans were given up because weights have moved.
    """

    def __init__(self, program: Program, config: Config, stats: RunnerStats) -> None:
        self.demoted: dict[int, str] = {}
        self._program = program
        self._config = config
        self._stats = stats
        self._failed = ""
        self._num_failures = 0
        self._warned_of_memory = False
        self._refused: dict[Hashable, str] = {}
        self._sightings: dict[Hashable, int] = {}
        self.lost: frozenset[Hashable] = frozenset()

    def barred(self, route: Route, num_undeclared: int) -> str:
        """Why a route is not captured, ``""`` when it may be."""
        reason = self._failed or self._refused.get(route.key, "")
        if not reason and not route.is_declared and num_undeclared >= self._config.max_plans:
            reason = f"max_plans={self._config.max_plans} reached"
        if not reason and not captures_allowed() and route.key not in self.lost:
            reason = "captures are not allowed (graphcap.allow_capture(False))"
        return reason

    def note_lost(self, keys: Iterable[Hashable]) -> None:
        """The plans of routes were given up because weights have moved. Others in their place are nothing new, and are
        captured even where captures are not allowed."""
        self.lost |= frozenset(keys)

    def is_due(self, route: Route) -> bool:
        """Count a sighting; whether this one or the next is to be captured. The first such call is the warm-up."""
        if len(self._sightings) >= _MAX_KEYS:
            self._sightings.clear()
        seen = self._sightings[route.key] = self._sightings.get(route.key, 0) + 1
        return seen >= self.due(route) - 1

    def due(self, route: Route) -> int:
        """The sighting at which a route is captured."""
        return 2 if route.is_declared else self._config.capture_after

    def refuse(self, route: Route, reason: str) -> None:
        """Never capture a route."""
        self._refused[route.key] = reason
        revise()

    def note_no_memory(self, failure: Failure, reason: str) -> None:
        """A capture ran out of memory: nothing is wrong with its steps."""
        self._stats.failures.append(failure.reason)
        if not self._warned_of_memory:
            self._warned_of_memory = True
            name = self._program.name
            warnings.warn(f"graphcap: {name} runs without graphs where {reason}: {failure.reason}", stacklevel=2)

    def note_failure(self, failure: Failure) -> None:
        """A capture failed: its steps run live from now on, and after the second one nothing new is captured."""
        names = ", ".join(self._program.steps[number].name for number in failure.steps)
        reason = f"{names}: {failure.reason}" if names else failure.reason
        self._stats.failures.append(reason)
        self.demoted |= dict.fromkeys(failure.steps, f"capture failed: {failure.reason}")
        self._num_failures += 1
        if self._num_failures < _MAX_FAILURES:
            _log.info("%s: capture failed, these steps run live from now on: %s", self._program.name, reason)
            return
        self._failed = f"capture failed: {reason}"
        revise()
        warnings.warn(
            f"graphcap: {self._program.name} runs compiled, without further CUDA graphs: captures failed "
            f"{self._num_failures} times, last in {reason}",
            stacklevel=2,
        )
