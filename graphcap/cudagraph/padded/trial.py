"""Runs of one call that nobody sees: at its exact size, and padded with these or those values in the padded rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch

from graphcap.cudagraph.hardware.generators import GeneratorStates, same_random_numbers
from graphcap.cudagraph.padded.blame import first_departure, trace
from graphcap.cudagraph.padded.corner import corner
from graphcap.cudagraph.padded.form import why_not_alike, why_not_apart
from graphcap.cudagraph.padded.padding import Padding
from graphcap.cudagraph.padded.scratch import Scratch, Stage
from graphcap.cudagraph.padded.variation import vary
from graphcap.cudagraph.program import Program
from graphcap.cudagraph.recording.observe import Observation, observe

#: What one run left, by what a user would call it, cut to the real size.
Result = dict[str, Any]


class Trials:
    """The runs of one proof.

    Attributes:
        program: that is run.
        seen: the latest padded run.
    """

    def __init__(
        self,
        program: Program,
        args: Sequence[Any],
        padding: Padding,
        rung: Mapping[str, int],
        scratch: Scratch,
        device: torch.device,
        generators: GeneratorStates,
        captured: Collection[int] | None,
        beside: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        """Nothing has run yet. See :func:`~graphcap.cudagraph.padded.proof.prove`; ``scratch`` was made before the
        call, as were ``generators``, the states in which every run finds them."""
        self.program = program
        self.seen: Observation | None = None
        self._args, self._padding, self._rung = args, padding, rung
        self._scratch, self._device, self._generators = scratch, device, generators
        self._captured, self._beside = captured, beside

    @cached_property
    def _first(self) -> Stage:
        return self._scratch.stage()

    @cached_property
    def _second(self) -> Stage:
        return self._scratch.stage()

    def call(self, outputs: Sequence[Any]) -> Result:
        """What the caller's own run left."""
        return self._result(self._args, outputs)

    def find_what_was_written(self) -> None:
        """After the call, where part of the state is stood in for.

        Raises:
            Undecided: there is no room for as much.
        """
        self._scratch.look_again()

    def exact(self) -> Result:
        """A run at the exact size. It is good until the next one of :meth:`varied`."""
        args = self._first.arguments(self._args)
        with same_random_numbers(self._device, self._generators), torch.no_grad():
            return self._result(args, self.program.run(*args))

    def padded(self, outputs: Sequence[Any]) -> tuple[Result, str]:
        """A padded run with the declared fills, and how its outputs differ in kind from those of the call."""
        return self._run(self._second, None, outputs)

    def varied(self, seed: int | None, outputs: Sequence[Any]) -> Result:
        """One with other values in the padded rows; with ``None`` the same once more. Good until the next one."""
        return self._run(self._first, seed, outputs)[0]

    def first_departure(self, seed: int | None, apart: Callable[[torch.Tensor, torch.Tensor], bool]) -> str:
        """The first step whose real rows are apart, in the exact and the padded run or, with a seed, in the padded and
        the varied one; ``""`` where there is none. Ends what earlier runs left.

        Raises:
            Exception: what torch raises, such as for want of memory.
        """
        with torch.no_grad():
            with same_random_numbers(self._device, self._generators):
                exact = trace(self.program, self._first.arguments(self._args), None)
            with same_random_numbers(self._device, self._generators), self._beside():
                padded = trace(self.program, self._arguments(self._first, None)[1], exact)
            if seed is None:
                step = first_departure(self.program, padded, exact, apart, with_state=False)
                return step or first_departure(self.program, padded, exact, apart, with_state=True)
            with same_random_numbers(self._device, self._generators), self._beside():
                varied = trace(self.program, self._arguments(self._first, seed)[1], exact)
            return first_departure(self.program, varied, padded, apart, with_state=True)

    def _run(self, stage: Stage, seed: int | None, outputs: Sequence[Any]) -> tuple[Result, str]:
        exact, padded = self._arguments(stage, seed)
        with same_random_numbers(self._device, self._generators), torch.no_grad(), self._beside():
            self.seen, found = observe(self.program, padded, self._device, self._captured)
        cut = self._padding.cut(exact, found)
        misfit = why_not_apart(self.program, self._padding.inputs, padded, found)
        misfit = misfit or why_not_alike(cut, exact, outputs, self._args)
        for index in self._padding.inputs & set(self._scratch.written):
            exact[index] = corner(padded[index], self._args[index].shape)
        return self._result(exact, self._padding.cut(exact, found)), misfit

    def _arguments(self, stage: Stage, seed: int | None) -> tuple[list[Any], list[Any]]:
        """Arguments for one run, at their exact and at the padded size."""
        exact = stage.arguments(self._args)
        padded = self._padding.pad(exact, self._rung)
        if seed is not None:
            for index in sorted(self._padding.inputs):
                if self._varies(index):
                    vary(padded[index], self._args[index].shape, seed * 1000 + index)
        return exact, padded

    def _varies(self, index: int) -> bool:
        fill = self._padding.fill(index)
        return not self.program.inputs[index].is_write_index and isinstance(fill, (bool, int, float)) and fill == 0

    def _result(self, args: Sequence[Any], outputs: Sequence[Any]) -> Result:
        values = {f"output {number}": value for number, value in enumerate(outputs)}
        return values | {f"what is left in {self.program.inputs[i].name}": args[i] for i in self._scratch.written}
