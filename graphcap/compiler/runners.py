"""The graph runners of one region: those that are there, whose they are, and what those have counted that are gone.

There is one for each model instance that Dynamo serves with the region's graph, and one for each specialised size.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterable

import torch

from graphcap.cudagraph import GraphRunner, RunnerStats
from graphcap.cudagraph.dispatch.revision import revise


class Runners:
    """See the module.

    Attributes:
        are_of_several: whether there are, or were, runners for several instances.
    """

    def __init__(self) -> None:
        """None yet."""
        self.are_of_several = False
        self._alive: list[weakref.ref[GraphRunner]] = []
        self._gone: list[RunnerStats] = []
        self._retired = RunnerStats()
        self._counting = threading.RLock()  # a collection within may call back

    @property
    def alive(self) -> list[GraphRunner]:
        """Those that are there."""
        return [runner for ref in list(self._alive) if (runner := ref()) is not None]

    def attach(self, runner: GraphRunner) -> None:
        """Find its counters without keeping it alive."""
        stats, alive, gone = runner.stats, self._alive, self._gone

        def note_gone(ref: weakref.ref[GraphRunner]) -> None:  # anywhere, whatever is locked: no more than this
            gone.append(stats)
            with contextlib.suppress(ValueError):
                alive.remove(ref)
            revise()

        self.are_of_several |= any(_are_of_two_instances(each, runner) for each in self.alive)
        alive.append(weakref.ref(runner, note_gone))
        self._absorb_gone()
        revise()

    def detach(self, runner: GraphRunner) -> None:
        """Forget one that another one replaces, but not what it has counted."""
        with self._counting:
            for ref in list(self._alive):
                if ref() is runner:
                    self._alive.remove(ref)
                    self._gone.append(runner.stats)
        revise()

    def counted(self) -> tuple[list[GraphRunner], RunnerStats]:
        """Those that are there, and what all others have counted, together: each in one of the two."""
        with self._counting:
            alive = self.alive  # first: one that goes now is among the others
            self._absorb_gone()
            total = RunnerStats()
            total.absorb(self._retired)
        return alive, total

    def of(self, tensors: set[int]) -> list[GraphRunner]:
        """Those that compute with these parameters (their ids): of several instances, those of one or of a part of it.

        A runner whose parameters are all among them is of that instance, and then one that has some in common with it
        (a base with two adapters) is not. One that lost its parameters may be anybody's.
        """
        alive = self.alive
        if not self.are_of_several:
            return alive
        parameters = [ids_of(runner.parameters) for runner in alive]
        mine = [bool(known) and known <= tensors for known in parameters]
        if not any(mine):
            common = [len(known & tensors) for known in parameters]
            most = max(common, default=0)
            mine = [
                number == most and is_mostly(known, tensors) for known, number in zip(parameters, common, strict=True)
            ]
        return [runner for runner, known, is_mine in zip(alive, parameters, mine, strict=True) if is_mine or not known]

    def have(self, tensors: set[int]) -> bool:
        """Whether one of them computes with one of these."""
        return any(not ids_of(runner.parameters).isdisjoint(tensors) for runner in self.alive)

    def have_most_of(self, tensors: set[int]) -> bool:
        """Whether one of them computes with most of these, or with them for the most part."""
        return any(is_mostly(ids_of(runner.parameters), tensors) for runner in self.alive)

    def _absorb_gone(self) -> None:
        with self._counting:
            while self._gone:
                self._retired.absorb(self._gone.pop(0))


def ids_of(tensors: Iterable[weakref.ref[torch.Tensor]]) -> set[int]:
    """The ids of those that are still there."""
    return {id(tensor) for ref in tensors if (tensor := ref()) is not None}


def is_mostly(known: set[int], tensors: set[int]) -> bool:
    """Whether half of the smaller of two sets is in the other: more than a weight that two models have in common."""
    common = len(known & tensors)
    return common > 0 and 2 * common >= min(len(known), len(tensors))


def _are_of_two_instances(one: GraphRunner, other: GraphRunner) -> bool:
    """Each has a parameter that the other has not. (An instance that lost one has fewer, and is the same.)"""
    parameters = ids_of(one.parameters), ids_of(other.parameters)
    return bool(parameters[0] - parameters[1]) and bool(parameters[1] - parameters[0])
