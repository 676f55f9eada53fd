"""From the calls of a recording to a program: neighbours that a graph can hold become one piece, others are live steps.

Each step is a generated function that can be read: one line per call, values dropped after their last use.
"""

from __future__ import annotations

import linecache
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch

from graphcap.compiler import private
from graphcap.compiler.breakable.record import Call, Kind, Outcome, Recorder, Ref, Weak, set_generator_states
from graphcap.compiler.region import PieceRecord
from graphcap.compiler.rules import SplitRules, op_name
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


class LiveStep:
    """A call that runs live in every replay. Where ``outcome`` is set, it repeats that instead, once, and runs nothing.

    Attributes:
        reads: the values that it is given.
    """

    def __init__(self, run: Callable[..., Any], reads: Sequence[int]) -> None:
        self.reads = tuple(reads)
        self.outcome: Outcome | None = None
        self._run = run

    def __call__(self, *given: Any) -> Any:
        """Takes the read values, returns the new ones."""
        if self.outcome is None:
            return self._run(*given)
        outcome, self.outcome = self.outcome, None  # a second call in one replay would be a fault: it runs
        for number, tensor in outcome.written.items():
            given[self.reads.index(number)].copy_(tensor)
        set_generator_states(outcome.generators)
        return outcome.results


@dataclass
class _Group:
    """Neighbouring calls that become one step."""

    calls: list[Call]
    capture: Capture
    reason: str = ""
    views: list[tuple[int, int]] = field(default_factory=list)  # new value, and the value that it views


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
    numbers = _fold(recording)
    groups = _groups(recording, numbers, home, rules)
    outputs = _outputs(recording, groups)
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
        writer = _Writer(group)
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


def _fold(recording: Recorder) -> dict[int, torch.Tensor]:
    """The values made of Python numbers, those that were moved to another device or dtype included."""
    written = {storage for call in recording.calls for storage in call.written}
    found = {n: v.numbers for n, v in enumerate(recording.values) if v.numbers is not None}
    for call in recording.calls:
        reads = call.reads()
        if op_name(call.function) == "aten::_to_copy" and len(reads) == 1 and reads[0] in found:
            number = call.results[0]
            if recording.values[reads[0]].storage not in written and number is not None:
                leaves = [found[leaf.value] if isinstance(leaf, Ref) else leaf for leaf in call.leaves]
                args, kwargs = private.tree_unflatten(leaves, call.spec)
                with torch.inference_mode(False), torch.no_grad():
                    found[number] = call.function(*args, **kwargs)
    return found


def _groups(
    recording: Recorder, numbers: dict[int, torch.Tensor], home: torch.device, rules: SplitRules
) -> list[_Group]:
    groups: list[_Group] = []
    for call in _with_numbers(recording, numbers):
        live = call.live or _elsewhere(recording, call, home, numbers)
        split = rules.match_name(call.function)
        if live:
            groups.append(_Group([call], Capture.NEVER, f"{live} ({call.origin})"))
        elif split is not None:
            groups.append(_Group([call], Capture.FULL, split))
        elif groups and groups[-1].capture is Capture.ALWAYS:
            groups[-1].calls.append(call)
        else:
            groups.append(_Group([call], Capture.ALWAYS))
    return groups


def _with_numbers(recording: Recorder, numbers: dict[int, torch.Tensor]) -> Iterator[Call]:
    """The calls, with a call before the first use of each tensor made of Python numbers: a copy, as it may be written."""
    made: set[int] = set()

    def make(wanted: Iterable[int]) -> Iterator[Call]:
        for number in wanted:
            if number in numbers and number not in made:
                made.add(number)
                leaves, spec = private.tree_flatten(((numbers[number],), {}))
                origin = recording.values[number].origin
                yield Call(torch.ops.aten.clone.default, tuple(leaves), spec, (number,), frozenset(), "", origin)

    for call in recording.calls:
        if not any(number in numbers for number in call.results):
            yield from make(call.reads())
            yield call
    yield from make(number for number, _ in recording.outputs)


def _elsewhere(recording: Recorder, call: Call, home: torch.device, numbers: dict[int, torch.Tensor]) -> str:
    """Why a call is live for the devices that it touches; a number on the CPU is one that the kernel is given."""
    for number in (*call.reads(), *call.results):
        if number is not None and (device := recording.values[number].layout[3]) != home:
            if number in numbers and not recording.values[number].layout[0]:
                continue
            return f"{op_name(call.function)} touches a tensor on {device}"
    return ""


def _outputs(recording: Recorder, groups: list[_Group]) -> list[int]:
    """The values to return. A result that views an argument or another result is made by a line of its own."""
    views: dict[tuple[int, int], int] = {}
    for which in recording.outputs:
        if which[1]:
            views.setdefault(which, len(recording.values) + len(views))
    if views:
        if not groups or groups[-1].capture is not Capture.ALWAYS:
            groups.append(_Group([], Capture.ALWAYS))
        groups[-1].views = [(new, number) for (number, _), new in views.items()]
    return [views.get(which, which[0]) for which in recording.outputs]


def _read_later(groups: Iterable[_Group], made: Iterable[int], outputs: Sequence[int]) -> list[int]:
    later = set(outputs)
    for group in groups:
        later.update(number for call in group.calls for number in call.reads())
        later.update(number for _, number in group.views)
    return [number for number in made if number in later]


class _Writer:
    """Writes the function of one step. Names count from 0 in every step, so that twins have one text."""

    def __init__(self, group: _Group) -> None:
        self.reads: list[int] = []
        self.made: list[int] = []
        self._names: dict[int, str] = {}
        self._constants: dict[str, Any] = {}
        self._lines: list[str] = []
        self._uses: dict[str, int] = {}
        for call in group.calls:
            self._call(call)
        for new, number in group.views:
            self._line(f"{self._make(new)} = detach({self._read(number)})")

    def _call(self, call: Call) -> None:
        leaves = [_Name(self._read(leaf.value)) if isinstance(leaf, Ref) else leaf for leaf in call.leaves]
        args, kwargs = private.tree_unflatten(leaves, call.spec)
        for number in call.also:
            self._read(number)
        given = [self._text(arg) for arg in args] + [f"{key}={self._text(value)}" for key, value in kwargs.items()]
        function = self._constant(re.sub(r"\W+", "_", op_name(call.function)), call.function)
        text = f"{function}({', '.join(given)})"
        results = ["_" if number is None else self._make(number) for number in call.results]
        if call.bare and results:
            text = text if results == ["_"] else f"{results[0]} = {text}"
        elif any(number is not None for number in call.results):
            text = f"{', '.join(results)}, = flat({text})"
        self._line(f"{text}  # {call.origin.location.rpartition('/')[2]}")

    def _line(self, text: str) -> None:
        self._lines.append(text)

    def _read(self, number: int) -> str:
        if number not in self._names:
            self._names[number] = f"a{len(self.reads)}"
            self.reads.append(number)
        self._uses[self._names[number]] = len(self._lines)
        return self._names[number]

    def _make(self, number: int) -> str:
        self._names[number] = f"v{len(self.made)}"
        self.made.append(number)
        self._uses[self._names[number]] = len(self._lines)
        return self._names[number]

    def _constant(self, name: str, value: Any) -> str:
        for known, other in self._constants.items():
            if other is value:
                return known
        name = name if name not in self._constants else f"{name}_{len(self._constants)}"
        self._constants[name] = value
        return name

    def _text(self, value: Any) -> str:
        if isinstance(value, (list, tuple)) and type(value) in (list, tuple, torch.Size):
            inner = "".join(f"{self._text(each)}, " for each in value)
            return f"[{inner.rstrip(', ')}]" if isinstance(value, list) else f"({inner})"
        if isinstance(value, _Name) or value is None or type(value) in (bool, int, str):
            return repr(value)
        if type(value) is float and math.isfinite(value):
            return repr(value)
        if isinstance(value, dict):
            return "{" + ", ".join(f"{key!r}: {self._text(each)}" for key, each in value.items()) + "}"
        if isinstance(value, Weak):
            return f"{self._constant('weak', value.object)}()"
        return self._constant("constant", value)

    def finish(self, name: str, region: str, writes: Sequence[int]) -> tuple[Callable[..., Any], str, Any]:
        """The function, its text, and what it has in common with its twins."""
        kept = {self._names[number] for number in writes}
        lines = []
        for index, line in enumerate(self._lines):
            lines.append(f"    {line}")
            dead = [each for each, last in self._uses.items() if last == index and each not in kept]
            if dead:
                lines.append(f"    del {', '.join(dead)}")
        lines.append(f"    return [{', '.join(self._names[number] for number in writes)}]")
        body = "\n".join(lines)
        source = f"def {name}({', '.join(f'a{i}' for i in range(len(self.reads)))}):\n{body}\n"
        filename = f"<graphcap {region} {name}>"
        linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)  # tracebacks show the source
        namespace = {**self._constants, "flat": _flat, "detach": torch.Tensor.detach}
        exec(compile(source, filename, "exec"), namespace)  # the source was generated above
        functions = tuple(id(each) for each in self._constants.values())
        text = "\n".join(line.partition("  #")[0] for line in lines)
        return namespace[name], source, (text, functions)


@dataclass(frozen=True)
class _Name:
    text: str

    def __repr__(self) -> str:
        return self.text


def _flat(result: Any) -> list[Any]:
    return private.tree_flatten(result)[0]


def _apart(run: Callable[..., Any], group: _Group, autocast: Sequence[str]) -> Callable[..., Any]:
    """Operators run without grad and autocast, which have had their say; a user's function as its caller has it."""
    if any(isinstance(call.function, FunctionType) for call in group.calls):
        return run

    def call(*given: Any) -> Any:
        with torch.no_grad():
            return run(*given)

    for device in autocast:
        call = torch.autocast(device, enabled=False)(call)
    return call


def _record(step: Step, group: _Group, specs: Sequence[InputSpec], twin: int | None) -> PieceRecord:
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
