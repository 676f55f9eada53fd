"""Runs of one call that nobody sees: at its exact size, and padded with these or those values in its rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any

import torch

from graphcap.cudagraph.hardware.generators import GeneratorStates, same_random_numbers
from graphcap.cudagraph.padded.blame import first_departure, trace
from graphcap.cudagraph.padded.by_steps import ByStep, Sizes, exact_sizes, first_given_away, results
from graphcap.cudagraph.padded.corner import corner
from graphcap.cudagraph.padded.digest import digest
from graphcap.cudagraph.padded.form import why_not_alike, why_not_apart
from graphcap.cudagraph.padded.padding import Padding
from graphcap.cudagraph.padded.scratch import Scratch, Stage
from graphcap.cudagraph.padded.variation import Content, can_be_drawn
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
        """A run at the exact size. It is good until the next one of :meth:`other`."""
        args = self._first.arguments(self._args)
        with self._as_found():
            return self._result(args, self.program.run(*args))

    @property
    def can_be_drawn(self) -> bool:
        """Whether there are padded inputs whose rows may hold numbers that no row of the call holds."""
        inputs = self.program.inputs
        return any(self._varies(i) and can_be_drawn(self._args[i], inputs[i].value_bound) for i in self._padding.inputs)

    def base(self, outputs: Sequence[Any]) -> tuple[Result, str]:
        """A padded run with the declared fills, and how its outputs differ in kind from those of the call. Good until
        the next one of :meth:`base` or :meth:`alike_base`."""
        return self._run(self._second, None, outputs)

    def other(self, content: Content | None, outputs: Sequence[Any]) -> Result:
        """A run to compare with it, ``None`` for an identical one. Good until the next one."""
        return self._run(self._first, content, outputs)[0]

    def alike_base(self, content: Content) -> Result:
        """A padded run with rows of this content, in which steps of unknown meaning do not take part."""
        return self._result_by_step(self._second, content)

    def alike_other(self, content: Content) -> Result:
        """A run to compare with it. Good until the next one."""
        return self._result_by_step(self._first, content)

    def first_apart(self, base: Content, content: Content) -> str:
        """The first step whose real rows are other ones in two such runs; ``""`` where there is none. Ends what earlier
        runs left.

        Raises:
            Exception: what torch raises, such as for want of memory.
        """
        sizes = self._exact_sizes(results(self.program))
        contents = base, base, content  # what two identical runs round differently is nobody's fault
        one, again, other = (self._run_by_step(self._first, each, sizes, digest)[1] for each in contents)
        apart = (slot for slot in one if one[slot] == again.get(slot) != other.get(slot, one[slot]))
        return next((self._makers[slot] for slot in apart), "")

    def first_departure(
        self,
        content: Content | None,
        apart: Callable[[torch.Tensor, torch.Tensor], bool],
    ) -> str:
        """The first step whose real rows are apart, in the exact and the padded run or, with a content, in the padded
        one and that; ``""`` where there is none. Ends what earlier runs left.

        Raises:
            Exception: what torch raises, such as for want of memory.
        """
        with self._as_found():
            exact = trace(self.program, self._first.arguments(self._args), None)
        with self._as_found(), self._beside():
            padded = trace(self.program, self._arguments(self._first, None)[1], exact)
        if content is None:
            step = first_departure(self.program, padded, exact, apart, with_state=False)
            return step or first_departure(self.program, padded, exact, apart, with_state=True)
        with self._as_found(), self._beside():
            varied = trace(self.program, self._arguments(self._first, content)[1], exact)
        return first_departure(self.program, varied, padded, apart, with_state=True)

    def _run(self, stage: Stage, content: Content | None, outputs: Sequence[Any]) -> tuple[Result, str]:
        exact, padded = self._arguments(stage, content)
        with self._as_found(), self._beside():
            self.seen, found = observe(self.program, padded, self._device, self._captured)
        cut = self._padding.cut(exact, found)
        misfit = why_not_apart(self.program, self._padding.inputs, padded, found)
        misfit = misfit or why_not_alike(cut, exact, outputs, self._args)
        self._take_written(exact, padded)
        return self._result(exact, self._padding.cut(exact, found)), misfit

    @cached_property
    def _by_step(self) -> ByStep:
        with self._as_found(), self._beside():
            return ByStep(self.program, self._arguments(self._first, None)[1])

    @cached_property
    def _makers(self) -> dict[int, str]:
        """By slot, the step that makes what is in it."""
        return {slot: step.name for step in self.program.steps for slot in step.writes}

    @cached_property
    def _given_away(self) -> Sizes:
        return self._exact_sizes(first_given_away(self.program))

    def _exact_sizes(self, wanted: Collection[int]) -> Sizes:
        with self._as_found():
            return exact_sizes(self.program, self._first.arguments(self._args), wanted)

    def _result_by_step(self, stage: Stage, content: Content) -> Result:
        exact, rows, cut = self._run_by_step(stage, content, self._given_away, torch.clone)
        named = {f"result {slot} of {self._makers[slot]}": value for slot, value in rows.items()}
        return named | self._result(exact, cut)

    def _run_by_step(
        self, stage: Stage, content: Content, sizes: Sizes, keep: Callable[[torch.Tensor], Any]
    ) -> tuple[list[Any], dict[int, Any], tuple[Any, ...]]:
        """The arguments as they are left, what was kept of the rows in between by slot, and the outputs."""
        by_step = self._by_step
        exact, padded = self._arguments(stage, content)
        with self._as_found(), self._beside():
            rows, found = by_step.run(padded, sizes, keep)
        self._take_written(exact, padded)
        return exact, rows, self._padding.cut(exact, found)

    def _arguments(self, stage: Stage, content: Content | None) -> tuple[list[Any], list[Any]]:
        """Arguments for one run, at their exact and at the padded size."""
        exact = stage.arguments(self._args)
        padded = self._padding.pad(exact, self._rung)
        if content is not None:
            for index in filter(self._varies, sorted(self._padding.inputs)):
                content(padded[index], self._args[index].shape, self.program.inputs[index].value_bound, index)
        return exact, padded

    @contextmanager
    def _as_found(self) -> Iterator[None]:
        """Every run finds the same random numbers, and leaves them as they were."""
        with same_random_numbers(self._device, self._generators), torch.no_grad():
            yield

    def _take_written(self, exact: list[Any], padded: Sequence[Any]) -> None:
        """What a padded run wrote into copies of arguments is what it left in these."""
        for index in self._padding.inputs & set(self._scratch.written):
            exact[index] = corner(padded[index], self._args[index].shape)

    def _varies(self, index: int) -> bool:
        fill = self._padding.fill(index)
        return not self.program.inputs[index].is_write_index and isinstance(fill, (bool, int, float)) and fill == 0

    def _result(self, args: Sequence[Any], outputs: Sequence[Any]) -> Result:
        values = {f"output {number}": value for number, value in enumerate(outputs)}
        return values | {f"what is left in {self.program.inputs[i].name}": args[i] for i in self._scratch.written}
