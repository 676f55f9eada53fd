"""From the calls of a recording to the functions of its steps, and what they must share with those of other sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any, NamedTuple

import torch

from graphcap.compiler.breakable.groups import Group, fold_numbers, group_calls, returned_values
from graphcap.compiler.breakable.output_sizes import Sample
from graphcap.compiler.breakable.record import Recorder
from graphcap.compiler.breakable.writer import StepWriter
from graphcap.compiler.rules import SplitRules
from graphcap.cudagraph import Capture


class Face(NamedTuple):
    """What a step looks like from outside; slots as in :class:`graphcap.cudagraph.Step`."""

    reads: tuple[int, ...]
    writes: tuple[int, ...]
    mutates: tuple[int, ...]
    capture: Capture
    is_live: bool


@dataclass(frozen=True)
class StepAt:
    """One step, as it was recorded at one size.

    Attributes:
        function: takes the values that it reads, returns the new ones.
        group: its calls.
        face: see :class:`Face`.
        reads: the numbers of the values that it reads.
        made: the layout of each new one.
        call: of a live step the number of its call.
        source: of the function.
        twin_of: the first step with the same code, where that is another one.
    """

    function: Callable[..., Any]
    group: Group
    face: Face
    reads: tuple[int, ...]
    made: list[tuple[Any, ...]]
    call: int | None
    source: str
    twin_of: int | None


@dataclass(frozen=True)
class StepsAt:
    """One recording as functions.

    Attributes:
        values: per symbol the size that it was made at.
        steps: in order.
        outputs: the slots that are returned.
        sample: the sizes of what is returned.
    """

    values: Mapping[str, int]
    steps: list[StepAt]
    outputs: tuple[int, ...]
    sample: Sample

    def without_calls(self) -> StepsAt:
        """The same without what was recorded, which takes megabytes."""
        steps = [dataclasses.replace(each, group=Group([], each.group.capture), source="") for each in self.steps]
        return dataclasses.replace(self, steps=steps)


@dataclass(frozen=True)
class Surroundings:
    """What steps are made for.

    Attributes:
        home: where graphs are captured; calls that touch another device are live.
        rules: which operators are cut out of their neighbours.
        autocast: the types of device whose autocast is on around the call: what was recorded is cast already.
    """

    home: torch.device
    rules: SplitRules
    autocast: Sequence[str]


def steps_of(
    name: str,
    recording: Recorder,
    values: Mapping[str, int],
    slots: Mapping[int, int],
    num_inputs: int,
    around: Surroundings,
) -> StepsAt:
    """Number the slots and generate the functions.

    Args:
        name: for tracebacks.
        recording: without a refusal.
        values: per symbol the size of the call.
        slots: of the values that are inputs.
        num_inputs: slots that are taken.
        around: see :class:`Surroundings`.
    """
    numbers = fold_numbers(recording)
    groups = group_calls(recording, numbers, around.home, around.rules)
    returned = returned_values(recording, groups)
    slots, next_slot = dict(slots), num_inputs
    numbered = {id(call): number for number, call in enumerate(recording.calls)}
    steps: list[StepAt] = []
    seen: dict[Any, int] = {}
    for index, group in enumerate(groups):
        writer = StepWriter(group)
        is_live = group.capture is Capture.NEVER and bool(group.calls[0].live)
        made = writer.made if is_live else _read_later(groups[index + 1 :], writer.made, returned)
        run, source, twin_key = writer.finish(f"piece_{index}", name, made)
        writes = tuple(range(next_slot, next_slot + len(made)))
        next_slot += len(made)
        slots |= dict(zip(made, writes, strict=True))
        written = {storage for call in group.calls for storage in call.written}
        mutates = tuple(slots[n] for n in writer.reads if recording.values[n].storage in written)
        reads = tuple(slots[n] for n in writer.reads)
        twin = seen.setdefault(twin_key, index)
        steps.append(
            StepAt(
                function=_apart(run, group, around.autocast),
                group=group,
                face=Face(reads, writes, mutates, group.capture, is_live),
                reads=tuple(writer.reads),
                made=[recording.values[number].layout if number < len(recording.values) else () for number in made],
                call=numbered[id(group.calls[0])] if is_live else None,
                source=source,
                twin_of=None if twin == index else twin,
            )
        )
    return StepsAt(values, steps, tuple(slots[number] for number in returned), sample_of(recording, values))


def sample_of(recording: Recorder, values: Mapping[str, int]) -> Sample:
    """The sizes of what a call returned."""
    return Sample(values, tuple(tuple(recording.values[number].layout[0]) for number, _ in recording.outputs))


def _read_later(groups: Iterable[Group], made: Iterable[int], outputs: Sequence[int]) -> list[int]:
    later = set(outputs)
    for group in groups:
        later.update(number for call in group.calls for number in call.reads())
        later.update(number for _, number in group.views)
    return [number for number in made if number in later]


def _apart(run: Callable[..., Any], group: Group, autocast: Sequence[str]) -> Callable[..., Any]:
    """Operators run without grad and autocast, which have had their say; a user's function as its caller has it."""
    if any(isinstance(call.function, FunctionType) for call in group.calls):
        return run

    def call(*given: Any) -> Any:
        with torch.no_grad():
            return run(*given)

    for device in autocast:
        call = torch.autocast(device, enabled=False)(call)
    return call
