"""One runner per model instance.

Dynamo may serve several instances of a class with one graph: their parameters are arguments of it. Graphs hold
addresses, so the instances must not share plans, or each would find the other's weights moved. An instance is known by
two of its parameters, the first and the last (a buffer may be assigned anew on every call); when one of them dies, the
instance's plans go with it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from graphcap.config import Config
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
        return InstanceRunners(program, device, config, announce, parameters[0], parameters[-1])
    runner = GraphRunner(program, device, config)
    announce(runner)
    return runner


class InstanceRunners:
    """Calls a program through the runner of the instance whose tensors it is given."""

    def __init__(
        self,
        program: Program,
        device: GraphDevice,
        config: Config,
        announce: Callable[[GraphRunner], None],
        first: int,
        last: int,
    ) -> None:
        """Know instances by the arguments ``first`` and ``last``."""
        self._first, self._last = first, last
        self._program, self._device, self._config, self._announce = program, device, config, announce
        self._runners: dict[Identity, GraphRunner] = {}
        self._deaths: dict[Identity, list[weakref.ref[Any]]] = {}

    def __call__(self, *args: Any) -> Any:
        return self.call_with(args)

    def call_with(self, args: Sequence[Any]) -> Any:
        """As :meth:`GraphRunner.call_with`."""
        runner = self._runners.get((id(args[self._first]), id(args[self._last])))
        if runner is None:
            runner = self._new_instance(args[self._first], args[self._last])
        return runner.call_with(args)

    def _new_instance(self, first: Any, last: Any) -> GraphRunner:
        runner = GraphRunner(self._program, self._device, self._config)
        runner.instance = identity = id(first), id(last)
        forget = _forgetter(weakref.ref(self), identity)
        self._deaths[identity] = [weakref.ref(each, forget) for each in (first, last)]
        winner = self._runners.setdefault(identity, runner)  # of several threads the first one wins
        if winner is runner:
            self._announce(runner)
        return winner

    def forget(self, identity: Identity) -> None:
        """Drop the runner of an instance, and its plans."""
        self._runners.pop(identity, None)
        self._deaths.pop(identity, None)


def _forgetter(owner: weakref.ref[InstanceRunners], identity: Identity) -> Callable[[Any], None]:
    # The callback must not keep the runners alive: Dynamo drops them with the code that calls them.
    def forget(_: Any) -> None:
        runners = owner()
        if runners is not None:
            runners.forget(identity)

    return forget
