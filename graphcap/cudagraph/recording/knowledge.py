"""What warm-ups have shown about the calls of a program, by route, and what one size is taken to say about others.

Which values share memory is learned from a call that is watched step by step, which costs the host more than the call
itself. It follows from the code that runs, hardly ever from a size. So the first route of a family is watched; the
warm-ups of its other routes are plain runs of the program, there for the libraries, and their captures compare what
they see with what is taken for granted. Where that is wrong the route is watched itself. One such run is enough: what a
library prepares for a size it has prepared after its first sight. (With ``num_warmups=0`` other routes have none: what
a library needs to prepare it has prepared at another size, or the capture fails, nobody is blamed, and that route and
all that follow are warmed up after all.)

A family is a mode and a kind of batch, in steps that bring the same inputs, with sizes that are 0 or 1 apart: torch
takes dims of these sizes for contiguous whatever their strides are, so that an operation may return a view there that
copies elsewhere.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from typing import Any

import torch

from graphcap.cudagraph.dispatch.routes import Route
from graphcap.cudagraph.dispatch.step import current
from graphcap.cudagraph.program import Program
from graphcap.cudagraph.recording.observe import Observation, layouts_of, observe, signature_of


class Knowledge:
    """What is known of the routes of one program."""

    def __init__(self, program: Program, device: torch.device, every_route_is_warmed_up: bool = True) -> None:
        """Nothing is known yet.

        Args:
            program: whose.
            device: where it is captured.
            every_route_is_warmed_up: also those of a family that is known.
        """
        self._every_route_is_warmed_up = every_route_is_warmed_up
        self._program = program
        self._device = device
        self._watched: dict[Hashable, Observation] = {}  # by route
        self._families: dict[Hashable, Observation] = {}
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
        if not self.is_warm(route) and not self._every_route_is_warmed_up and route.key not in self._cold:
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

    def is_like_others(self, route: Route) -> bool:
        """Whether a call of this route has run live, and the rest is taken from another route of its family: one more
        warm-up would show nothing."""
        return self.is_warm(route) and route.key not in self._watched

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
        self._every_route_is_warmed_up = True

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


def _family(route: Route) -> Hashable:
    batch = route.batch
    special = tuple((index, size) for index, size in enumerate((*route.sizes, batch.num_reqs)) if size in (0, 1))
    said = current()
    names = None if said is None else said.inputs.names
    return route.mode, batch.uniform_query_len, batch.tags, names, frozenset(route.rung), special
