"""A program for the graph runtime out of recordings: one for each size, with one set of steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from graphcap.compiler.breakable.output_sizes import Sample, contradicts, solve
from graphcap.compiler.breakable.sized import At, LiveStep, SizedStep
from graphcap.compiler.breakable.steps import StepAt, StepsAt
from graphcap.compiler.region import PieceRecord
from graphcap.compiler.stitch import compile_live, live_source
from graphcap.cudagraph import Capture, InputSpec, Program, Step


@dataclass
class Built:
    """A program, and what belongs to it.

    Attributes:
        program: its inputs are the call's tensors, its sizes, and the tensors from outside.
        records: a line for the report per step.
        source: every generated function of the first recording, and the one that runs all steps.
        lives: the steps that run live because of what they call, in order.
        at: what was recorded, by size.
        steps: the functions of the program's steps.
    """

    program: Program
    records: list[PieceRecord]
    source: str
    lives: list[LiveStep]
    at: dict[At, StepsAt]
    steps: list[SizedStep]

    def why_not(self, other: StepsAt) -> str:
        """Why a recording of another size is no part of this program, ``""`` where it may be."""
        first = next(iter(self.at.values()))
        if len(other.steps) != len(first.steps):
            return f"{len(other.steps)} steps, where other sizes have {len(first.steps)}"
        for index, (mine, known) in enumerate(zip(other.steps, first.steps, strict=True)):
            if mine.face != known.face:
                origin = mine.group.calls[0].origin if mine.group.calls else "the result"
                return f"piece_{index} ({origin}) reads, makes or writes other values than at other sizes"
        ranks = [len(size) for size in other.sample.outputs]
        if other.outputs != first.outputs or ranks != [len(size) for size in first.sample.outputs]:
            return "other results than at other sizes"
        return ""

    def add(self, recorded: StepsAt) -> None:
        """Have calls of another size run what was recorded there."""
        at = tuple(recorded.values.values())
        self.at[at] = recorded if not self.at else recorded.without_calls()  # reports show the first one
        for step, here in zip(self.steps, recorded.steps, strict=True):
            if isinstance(step, LiveStep):
                step.add(at, here.function, here.reads, here.made)
            else:
                step.functions[at] = here.function

    def is_contradicted(self, sample: Sample) -> bool:
        """Whether a call's results have other sizes than the program says."""
        return contradicts(self.program.output_sizes, sample)


def build(
    name: str,
    specs: Sequence[InputSpec],
    recorded: Sequence[StepsAt],
    samples: Sequence[Sample],
    largest: Mapping[str, int],
    serve: Callable[[Callable[..., Any], tuple[Any, ...]], Any],
) -> Built:
    """Make the program.

    Args:
        name: the region's name.
        specs: of the inputs: the tensors of the call, a scalar for each symbol, the tensors from outside.
        recorded: what was recorded, each at another size and all with the same steps. Reports show the first one.
        samples: the sizes of the results in all calls that were looked at.
        largest: the symbols with a largest size, each with it.
        serve: runs a call live, given the function that runs all steps and its inputs.
    """
    first = recorded[0]
    num_sizes = len(first.values)
    num_tensors = next((at for at, spec in enumerate(specs) if spec.symbol is not None), len(specs))
    scalars = tuple(range(num_tensors, num_tensors + num_sizes))
    symbols = frozenset(first.values)
    functions: list[SizedStep] = []
    steps, records = [], []
    for index, recorded_step in enumerate(first.steps):
        face, group = recorded_step.face, recorded_step.group
        functions.append(LiveStep(num_sizes) if face.is_live else SizedStep(num_sizes))
        fn = functions[-1] if num_sizes or face.is_live else recorded_step.function
        reads, step_name = (*scalars, *face.reads), f"piece_{index}"
        step = Step(step_name, fn, reads, face.writes, face.mutates, face.capture, group.reason, symbols)
        steps.append(replace(step, moves_on=group.moves_on))
        records.append(_record(steps[-1], recorded_step, specs))
    text = live_source(name, specs, steps, first.outputs, [step.capture.value for step in steps])
    stitched = compile_live(name, text, steps, first.outputs)

    def run(*inputs: Any) -> Any:
        return serve(stitched, inputs)

    program = Program(name, tuple(specs), tuple(steps), first.outputs, run, solve(samples), largest)
    lives = [step for step in functions if isinstance(step, LiveStep)]
    built = Built(program, records, "\n".join((*(each.source for each in first.steps), text)), lives, {}, functions)
    for each in recorded:
        built.add(each)
    return built


def _record(step: Step, recorded: StepAt, specs: Sequence[InputSpec]) -> PieceRecord:
    group = recorded.group
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
        twin_of=recorded.twin_of,
        note="",
        passes=[],
    )
