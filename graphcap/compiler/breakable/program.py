"""From the calls of a recording to a program for the graph runtime."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch

from graphcap.compiler.breakable.calls import Kind, Outcome
from graphcap.compiler.breakable.groups import Group, fold_numbers, group_calls, returned_values
from graphcap.compiler.breakable.limits import set_generator_states
from graphcap.compiler.breakable.record import Recorder
from graphcap.compiler.breakable.writer import StepWriter
from graphcap.compiler.region import PieceRecord
from graphcap.compiler.rules import SplitRules
from graphcap.compiler.stitch import compile_live, live_source
from graphcap.cudagraph import Capture, InputKind, InputSpec, Program, Step


@dataclass
class Built:
    """A program, and what belongs to it.

    Attributes:
        program: its inputs are the recorded call's tensors, then those from outside.
        outside: the numbers of the values from outside, in the order of the inputs.
        records: a line for the report per step.
        source: every generated function.
        lives: the steps that run live because of what they call, by the number of that call.
    """

    program: Program
    outside: list[int]
    records: list[PieceRecord]
    source: str
    lives: dict[int, LiveStep]


class _Repeat(threading.local):
    outcome: Outcome | None = None


class LiveStep:
    """A call that runs live in every replay. In a comparison it may repeat what it did.

    Attributes:
        reads: the values that it is given.
    """

    def __init__(self, run: Callable[..., Any], reads: Sequence[int]) -> None:
        self.reads = tuple(reads)
        self._run = run
        self._repeat = _Repeat()

    def repeat(self, outcome: Outcome | None) -> None:
        """Do not run at the next call in this thread, but do what an earlier run did; ``None`` takes that back."""
        self._repeat.outcome = outcome

    def __call__(self, *given: Any) -> Any:
        """Takes the read values, returns the new ones."""
        outcome = self._repeat.outcome
        if outcome is None:
            return self._run(*given)
        self._repeat.outcome = None
        for number, tensor in outcome.written.items():
            given[self.reads.index(number)].copy_(tensor)
        set_generator_states(outcome.generators)
        return outcome.results


def build(
    name: str,
    recording: Recorder,
    names: Sequence[str],
    home: torch.device,
    rules: SplitRules,
    autocast: Sequence[str],
) -> Built:
    """Number the slots and generate the steps.

    Args:
        name: the region's name.
        recording: without a refusal.
        names: of the arguments' tensors and then of the values from outside, in the order of their numbers.
        home: where graphs are captured; calls that touch another device are live.
        rules: which operators are cut out of their neighbours.
        autocast: the types of device whose autocast is on around the call: what was recorded is cast already.
    """
    numbers = fold_numbers(recording)
    groups = group_calls(recording, numbers, home, rules)
    outputs = returned_values(recording, groups)
    inputs = [n for n, v in enumerate(recording.values) if v.kind is Kind.ARGUMENT]
    outside = [n for n, v in enumerate(recording.values) if v.kind is Kind.OUTSIDE]
    slots = {number: slot for slot, number in enumerate((*inputs, *outside))}
    specs = [
        InputSpec(each, InputKind.STATIC if slot >= len(inputs) else InputKind.TENSOR)
        for slot, each in enumerate(names)
    ]
    steps, records, sources = [], [], []
    lives: dict[int, LiveStep] = {}
    numbered = {id(call): number for number, call in enumerate(recording.calls)}
    seen: dict[Any, int] = {}
    for index, group in enumerate(groups):
        writer = StepWriter(group)
        is_live = group.capture is Capture.NEVER and bool(group.calls[0].live)
        writes = writer.made if is_live else _read_later(groups[index + 1 :], writer.made, outputs)
        step_name = f"piece_{index}"
        run, source, twin_key = writer.finish(step_name, name, writes)
        fn = _apart(run, group, autocast)
        if is_live:
            fn = lives[numbered[id(group.calls[0])]] = LiveStep(fn, writer.reads)
        slots |= {number: len(slots) + offset for offset, number in enumerate(writes)}
        written = {storage for call in group.calls for storage in call.written}
        mutates = tuple(slots[n] for n in writer.reads if recording.values[n].storage in written)
        reads = tuple(slots[n] for n in writer.reads)
        steps.append(Step(step_name, fn, reads, tuple(slots[n] for n in writes), mutates, group.capture, group.reason))
        twin = seen.setdefault(twin_key, index)
        records.append(_record(steps[-1], group, specs, None if twin == index else twin))
        sources.append(source)
    returned = tuple(slots[number] for number in outputs)
    text = live_source(name, specs, steps, returned, [step.capture.value for step in steps])
    program = Program(name, tuple(specs), tuple(steps), returned, compile_live(name, text, steps, returned))
    return Built(program, outside, records, "\n".join((*sources, text)), lives)


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


def _record(step: Step, group: Group, specs: Sequence[InputSpec], twin: int | None) -> PieceRecord:
    origin = group.calls[0].origin if group.calls else None
    return PieceRecord(
        name=step.name,
        kind="eager" if step.capture is Capture.NEVER else "captured",
        capture=step.capture.value,
        reason=step.reason,
        module_path=origin.module if origin else "",
        source=origin.location if origin else "",
        num_nodes=len(group.calls) + len(group.views),
        mutates=tuple(specs[slot].name for slot in step.mutates if slot < len(specs)),
        origin="eager",
        key="",
        seconds=0.0,
        twin_of=twin,
        note="",
        passes=[],
    )
