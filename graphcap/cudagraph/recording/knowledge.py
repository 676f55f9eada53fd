"""What warm-ups have shown about the calls of a program, by route, and what one size is taken to say about others.

Which values share memory is learned from a call that is watched step by step, which costs the host more than the call
itself. It follows from the code that runs, hardly ever from a size. So the first route of a family is watched; the
warm-ups of its other routes are plain runs of the program, there for the libraries, and their captures compare what
they see with what is taken for granted. Where that is wrong the route is watched itself. One such run is enough: what a
library prepares for a size it has prepared after its first sight. A ladder does without where all that is recorded is
compiled: such code keeps nothing for a size (:class:`Further`). What a library has to prepare all the same it can
prepare while it is recorded, or the capture fails, nobody is blamed, and that route and all that follow are warmed up
after all.

A family is a mode and a kind of batch, in steps that bring the same inputs, with sizes that are 0 or 1 apart: torch
takes dims of these sizes for contiguous whatever their strides are, so that an operation may return a view there that
copies elsewhere.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Hashable, Sequence
from typing import Any

import torch

from graphcap.cudagraph.dispatch.phase import Phase, current_purpose
from graphcap.cudagraph.dispatch.route import Route
from graphcap.cudagraph.dispatch.step import current
from graphcap.cudagraph.program import Capture, Program
from graphcap.cudagraph.recording.observe import Observation, layouts_of, observe, signature_of


class Further(enum.Enum):
    """Which routes of a family that is known are warmed up before they are captured."""

    ALL = enum.auto()  #: each of them
    UNLESS_COMPILED = enum.auto()  #: those whose graphs hold what somebody declared, or attention; in traffic, all
    NONE = enum.auto()  #: none


class Knowledge:
    """What is known of the routes of one program."""

    def __init__(self, program: Program, device: torch.device, further: Further = Further.ALL) -> None:
        """Nothing is known yet.

        Args:
            program: whose.
            device: where it is captured.
            further: which of the routes that are not the first of their family are warmed up.
        """
        self._further = further
        self._program = program
        self._device = device
        self._watched: dict[Hashable, Observation] = {}  # by route
        self._families: dict[tuple[Hashable, Hashable], Observation] = {}
        self._warm: dict[Hashable, tuple[Any, ...]] = {}  # routes that may be captured, for calls of these layouts
        self._cold: set[Hashable] = set()  # routes that need a warm-up, whatever is known of their family
        self._apart: set[Hashable] = set()  # routes that are unlike their family
        self._any: Observation | None = None

    @property
    def any_call(self) -> Observation | None:
        """What some call has shown, whichever it was."""
        return self._any

    def of(self, route: Route, args: Sequence[Any], captured: Collection[int]) -> Observation | None:
        """What is known about a call on a route that is to be captured; ``None`` where a warm-up has to come first."""
        if not self.is_warm(route) and not self._needs_warm_up(route, captured, current_purpose().phase):
            return self._from_family(route, args, captured)
        if self._warm.get(route.key) != layouts_of(self._program, args, captured):
            return None
        watched = self._watched.get(route.key)
        if watched is not None and watched.signature == signature_of(self._program, args, captured):
            return watched
        return self._from_family(route, args, captured)

    def is_warm(self, route: Route) -> bool:
        """Whether a call of this route has run live before."""
        return route.key in self._warm

    def is_told_by_others(self, route: Route, captured: Collection[int]) -> bool:
        """Whether a route of the same family shows all there is to know, for a ladder: one more warm-up would show
        nothing. Taken from routes of steps with whatever inputs, as the step of the call is not known here."""
        if self.is_warm(route):
            return route.key not in self._watched
        known = route.key not in self._apart and any(family[0] == _kind(route) for family in self._families)
        return known and not self._needs_warm_up(route, captured, Phase.WARM_UP)

    def _needs_warm_up(self, route: Route, captured: Collection[int], phase: Phase) -> bool:
        if route.key in self._cold or self._further is Further.ALL:
            return True
        if self._further is Further.NONE:
            return False
        steps = [self._program.steps[number] for number in captured]
        is_compiled = all(step.capture is Capture.ALWAYS and not step.unproven for step in steps)
        return phase is Phase.TRAFFIC or not is_compiled

    def warm_up(
        self, route: Route, args: Sequence[Any], captured: Collection[int]
    ) -> tuple[tuple[Any, ...], Observation]:
        """Run a call live: the outputs, and what is known of the values.

        Args:
            route: what will be captured.
            args: of the call, at the sizes of the route.
            captured: the steps that may be captured on it.
        """
        self._cold.discard(route.key)
        known = self._watched.get(route.key) or self._family_of(route)
        layouts = layouts_of(self._program, args, captured)
        if known is None or self._warm.get(route.key) == layouts:  # warm, and still what is known did not do
            known, outputs = observe(self._program, args, self._device, captured)
            self.note(route, known)
            return outputs, known
        outputs = tuple(self._program.run(*args))
        self._warm[route.key] = layouts
        return outputs, known

    def note(self, route: Route, seen: Observation) -> None:
        """A call at the sizes of this route was watched."""
        self._any = self._watched[route.key] = seen
        self._families.setdefault(_family(route), seen)
        self._warm[route.key] = seen.signature[0]

    def note_call(self, seen: Observation) -> None:
        """A call was watched that is on no route."""
        self._any = seen

    def warm_up_every_route(self) -> None:
        """A route could not be captured without a warm-up: none is tried without one from now on. A failed capture
        costs more, and takes the pool with it where torch cannot end it."""
        self._further = Further.ALL

    def cool(self, key: Hashable) -> None:
        """Let the next call of a route be a warm-up again."""
        self._warm.pop(key, None)
        self._cold.add(key)

    def doubt(self, key: Hashable) -> None:
        """What is known of a route does not hold: let it be watched again."""
        self._warm.pop(key, None)
        self._watched.pop(key, None)
        self._apart.add(key)

    def _family_of(self, route: Route) -> Observation | None:
        return None if route.key in self._apart else self._families.get(_family(route))

    def _from_family(self, route: Route, args: Sequence[Any], captured: Collection[int]) -> Observation | None:
        known = self._family_of(route)
        return known and known.at_size_of(self._program, args, self._device, captured)


def _family(route: Route) -> tuple[Hashable, Hashable]:
    """The kind of the route, and the inputs of the step in force."""
    said = current()
    return _kind(route), None if said is None else said.inputs.names


def _kind(route: Route) -> Hashable:
    batch = route.batch
    special = tuple((index, size) for index, size in enumerate((*route.sizes, batch.num_reqs)) if size in (0, 1))
    return route.mode, batch.uniform_query_len, batch.tags, frozenset(route.rung), special
