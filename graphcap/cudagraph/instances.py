"""One runner per model instance.

Dynamo may serve several instances of a class with one graph: their parameters are arguments of it. Graphs hold
addresses, so the instances must not share plans, or each would find the other's weights moved. An instance is found by
two of its parameters, the first and the last (a buffer may be assigned anew on every call). Where some parameters were
replaced it is known by the others, and keeps the plans that do not read them; when most of them are gone, so is the
instance, and its plans go with it. Where it goes while captures are not allowed, a new one is taken for it with other
weights, and may have the same plans.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from graphcap.config import Config
from graphcap.cudagraph.dispatch.phase import captures_allowed
from graphcap.cudagraph.dispatch.revision import revise
from graphcap.cudagraph.hardware.device import GraphDevice
from graphcap.cudagraph.program import Program
from graphcap.cudagraph.runner import GraphRunner

Identity = tuple[int, int]


def graph_runner(
    program: Program, device: GraphDevice, config: Config, announce: Callable[[GraphRunner], None]
) -> Callable[..., Any]:
    """What to call for a region: a runner, or one for each instance where the program has static inputs.

    Args:
        program: the region.
        device: where it is captured.
        config: the settings of its runners.
        announce: told of each runner when it is made. It should not keep the runner alive.
    """
    parameters = [index for index, spec in enumerate(program.inputs) if spec.is_parameter]
    if parameters:
        return InstanceRunners(program, device, config, announce, parameters)
    runner = GraphRunner(program, device, config)
    announce(runner)
    return runner


class _Instance:
    """A runner and the parameters that it is for.

    Attributes:
        parameters: these.
        num_gone: how many of them there are no more.
    """

    def __init__(
        self, runner: GraphRunner, parameters: Sequence[torch.Tensor], note_gone: Callable[[Any], None]
    ) -> None:
        self.runner, self.num_gone = runner, 0
        self.parameters = [weakref.ref(each, note_gone) for each in parameters]

    @property
    def is_alive(self) -> bool:
        """Whether half of its parameters are still there, or more."""
        return 2 * self.num_gone <= len(self.parameters)

    def has_half_of(self, parameters: Sequence[torch.Tensor]) -> bool:
        """Whether half of these are its own, or more: the others were replaced."""
        same = sum(known() is each for known, each in zip(self.parameters, parameters, strict=True))
        return 2 * same >= len(parameters)


class InstanceRunners:
    """Calls a program through the runner of the instance whose tensors it is given."""

    def __init__(
        self,
        program: Program,
        device: GraphDevice,
        config: Config,
        announce: Callable[[GraphRunner], None],
        parameters: Sequence[int],
    ) -> None:
        """Know instances by these arguments."""
        self._parameters, self._first, self._last = parameters, parameters[0], parameters[-1]
        self._program, self._device, self._config, self._announce = program, device, config, announce
        self._instances: dict[Identity, _Instance] = {}
        # While captures are not allowed: what instances had captured that went, and those that came.
        self._owed: list[frozenset[Hashable]] = []
        self._newcomers: list[weakref.ref[GraphRunner]] = []

    def __call__(self, *args: Any) -> Any:
        return self.call_with(args)

    def call_with(self, args: Sequence[Any]) -> Any:
        """As :meth:`GraphRunner.call_with`."""
        instance = self._instances.get((id(args[self._first]), id(args[self._last])))
        if instance is None or instance.num_gone:
            instance = self._find(args)
        return instance.runner.call_with(args)

    def _find(self, args: Sequence[Any]) -> _Instance:
        """The instance that most of these parameters belong to, or a new one."""
        parameters = [args[index] for index in self._parameters]
        identity = id(parameters[0]), id(parameters[-1])
        keys = list(self._instances)  # a collection may take one out at any moment
        changed = [(key, each) for key in keys if (each := self._instances.get(key)) is not None and each.num_gone]
        known = next(((key, each) for key, each in changed if each.has_half_of(parameters)), None)
        for key in {key for key, _ in changed} & {identity, *(known or ())[:1]}:
            self._instances.pop(key, None)
        runner = GraphRunner(self._program, self._device, self._config) if known is None else known[1].runner
        found = _Instance(runner, parameters, _noter(weakref.ref(self), identity))
        winner = self._instances.setdefault(identity, found)  # of several threads the first one wins
        if winner is found:
            runner.parameters = found.parameters
            if known is None:
                self._take_place(runner)
                self._announce(runner)
            revise()
        return winner

    def _take_place(self, runner: GraphRunner) -> None:
        """Of an instance that went while captures were not allowed. Ranks of a group need not see it go together."""
        if captures_allowed() or runner.agreement.is_group:
            self._owed.clear()
            self._newcomers.clear()
            return
        try:
            runner.replaces(self._owed.pop(0))
        except IndexError:
            self._newcomers.append(weakref.ref(runner))  # the old weights may outlive the first call with new ones

    def note_gone(self, identity: Identity) -> None:
        """A parameter of an instance is gone: replaced, or the first of all to go."""
        instance = self._instances.get(identity)
        if instance is not None:
            instance.num_gone += 1
            if not instance.is_alive and self._instances.pop(identity, None) is not None and not captures_allowed():
                self._pass_on(instance.runner.captured)

    def _pass_on(self, captured: frozenset[Hashable]) -> None:
        while captured and self._newcomers:
            newcomer = self._newcomers.pop(0)()
            if newcomer is not None:
                newcomer.replaces(captured)
                return
        if captured:
            self._owed.append(captured)


def _noter(owner: weakref.ref[InstanceRunners], identity: Identity) -> Callable[[Any], None]:
    # The callback must not keep the runners alive: Dynamo drops them with the code that calls them.
    def note(_: Any) -> None:
        runners = owner()
        if runners is not None:
            runners.note_gone(identity)

    return note
