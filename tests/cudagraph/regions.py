"""Programs built by hand from plain functions, and a runner for them on the simulated device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from graphcap.config import Config
from graphcap.cudagraph import Capture, Constant, GraphDevice, GraphRunner, InputKind, InputSpec, Program, Step
from graphcap.cudagraph.hardware.simulated import SimulatedDevice

LIVE = Capture.NEVER


class Region:
    """Collects inputs and steps; slots are handed out in order."""

    def __init__(self) -> None:
        self.specs: list[InputSpec] = []
        self.steps: list[Step] = []
        self._next = 0

    def tensor(self, name: str) -> int:
        return self._input(InputSpec(name, InputKind.TENSOR))

    def static(self, name: str) -> int:
        return self._input(InputSpec(name, InputKind.STATIC))

    def size(self, name: str, in_key: bool = True) -> int:
        return self._input(InputSpec(name, InputKind.SCALAR, symbol=name, in_key=in_key))

    def _input(self, spec: InputSpec) -> int:
        assert not self.steps, "inputs come before steps"
        self.specs.append(spec)
        self._next += 1
        return self._next - 1

    def step(
        self,
        fn: Callable[..., Any],
        *reads: int,
        writes: int = 1,
        mutates: Sequence[int] = (),
        capture: Capture = Capture.ALWAYS,
        into: Callable[..., Any] | None = None,
    ) -> Any:
        """Add a step; return its slot, or a tuple of them. ``fn`` returns a bare value when ``writes`` is 1."""
        slots = tuple(range(self._next, self._next + writes))
        self._next += writes
        call = (lambda *args: (fn(*args),)) if writes == 1 else fn
        name = f"step_{len(self.steps)}"
        self.steps.append(Step(name, call, reads, slots, tuple(mutates), capture, "for the test", into=into))
        return slots[0] if writes == 1 else slots

    def returning(self, *outputs: int | Constant) -> Program:
        steps, inputs, num_slots = tuple(self.steps), tuple(self.specs), self._next

        def run(*args: Any) -> tuple[Any, ...]:
            slots = [*args, *[None] * (num_slots - len(args))]
            for step in steps:
                for slot, value in zip(step.writes, step.fn(*[slots[each] for each in step.reads]), strict=True):
                    slots[slot] = value
            return tuple(each.value if isinstance(each, Constant) else slots[each] for each in outputs)

        return Program("region", inputs, steps, outputs, run)


def runner_of(program: Program, device: GraphDevice | None = None, **settings: Any) -> GraphRunner:
    return GraphRunner(program, device or SimulatedDevice(), Config(simulate=True, **settings))


def warm(runner: GraphRunner, *args: Any, calls: int = 3) -> None:
    """Call until the shape is captured."""
    for _ in range(calls):
        runner(*args)
    assert runner.stats.plans, runner.stats


def randn(*size: int) -> torch.Tensor:
    return torch.randn(*size)
