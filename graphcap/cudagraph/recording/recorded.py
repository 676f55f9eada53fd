"""What a capture leaves behind, and what can be told from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from graphcap.cudagraph.hardware.device import GraphDevice, Pool, Segment
from graphcap.cudagraph.hardware.hooks import HookError
from graphcap.cudagraph.program import Program
from graphcap.cudagraph.recording.bindings import Binding
from graphcap.cudagraph.recording.layout import Layout
from graphcap.cudagraph.recording.liveness import mutated_roots
from graphcap.cudagraph.recording.observe import Observation
from graphcap.cudagraph.recording.sharing import UnlikeOtherSizes
from graphcap.cudagraph.replaying.generations import Generations
from graphcap.cudagraph.replaying.handout import Lent, Policy, Ring, kept_blocks
from graphcap.cudagraph.replaying.outputs import Clone, OutputPlan, StaticMemory, plan_outputs


@dataclass(frozen=True, slots=True)
class Failure:
    """A capture that did not work out.

    Attributes:
        steps: the steps that may be to blame; empty when no step is.
        reason: one line.
        out_of_memory: whether the device was full.
        misjudged: whether it was only taken for granted that this size is like another one, and it is not.
    """

    steps: tuple[int, ...]
    reason: str
    out_of_memory: bool = False
    misjudged: bool = False

    @staticmethod
    def of_ranks(failures: Sequence[Failure | None]) -> Failure | None:
        """What the ranks of a group have in common: the steps that failed on any of them, and the first reason."""
        found = [(rank, each) for rank, each in enumerate(failures) if each is not None]
        if not found or all(each == failures[0] for each in failures):
            return failures[0]
        rank, first = found[0]
        steps = sorted({step for _, each in found for step in each.steps})
        return Failure(
            tuple(steps),
            f"rank {rank}: {first.reason}",
            any(each.out_of_memory for _, each in found),
            all(each.misjudged for _, each in found),
        )

    @staticmethod
    def of(error: BaseException, steps: tuple[int, ...] = ()) -> Failure:
        """What an exception says about ``steps``. A full device, a failed hook or a size that is unlike others is no
        fault of theirs."""
        full, misjudged = is_out_of_memory(error), isinstance(error, UnlikeOtherSizes)
        innocent = full or misjudged or isinstance(error, HookError)
        return Failure(() if innocent else steps, describe(error), full, misjudged)


@dataclass(slots=True)
class Recorded:
    """What a capture leaves behind. It holds no tensor of the caller.

    Attributes:
        program, seen, layout: what was captured.
        pool: pinned as long as this lives.
        segments: in order.
        timeline: ``~n`` replays segment n, ``n`` runs step n live.
        stand_ins: for inputs and bridged slots the tensor that captured steps read in their place.
        given: what captured steps were given for the inputs and live results that they read: stand-ins, non-owning
            views, numbers.
        constants: non-owning views (and numbers) that captured steps made and steps of other segments read.
        places: for fixed slots the address and size they must have.
        memory: which addresses are static.
        outputs: how outputs leave.
        blocks: memory that stand-ins lie in.
    """

    program: Program
    seen: Observation
    layout: Layout
    pool: Pool
    segments: list[Segment] = field(default_factory=list)
    timeline: list[int] = field(default_factory=list)
    stand_ins: dict[int, torch.Tensor] = field(default_factory=dict)
    given: dict[int, Any] = field(default_factory=dict)
    constants: dict[int, Any] = field(default_factory=dict)
    places: dict[int, tuple[int, torch.Size]] = field(default_factory=dict)
    memory: StaticMemory = field(default_factory=lambda: StaticMemory({}, set()))
    outputs: OutputPlan = field(default_factory=lambda: OutputPlan((), {}, ()))
    blocks: list[torch.Tensor] = field(default_factory=list)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the allocator or the driver had no memory left; a graph that cannot be instantiated says it in words."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "out of memory" in str(error).lower()
    )


def describe(error: BaseException) -> str:
    """An exception in one line. The exception itself would keep the tensors of its frames alive."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def run_live(program: Program, slots: list[Any], start: int) -> None:
    """Run the steps from ``start`` on without any graph, within the slot table."""
    for step in program.steps[start:]:
        for slot, value in zip(step.writes, step.fn(*[slots[slot] for slot in step.reads]), strict=True):
            slots[slot] = value


def outputs_of(recorded: Recorded, slots: Sequence[Any], captured_below: int) -> OutputPlan:
    """How the values in ``slots`` leave, where the captured steps before ``captured_below`` were really captured."""
    captured = captured_slots(recorded.program, recorded.layout, captured_below)
    borrowed = borrowed_slots(recorded.program, recorded.layout, recorded.seen.roots, captured)
    return plan_outputs(recorded.program.outputs, recorded.seen, slots, captured, borrowed, recorded.memory)


def handed_out(
    recorded: Recorded, plan: OutputPlan, slots: Sequence[Any], policy: Policy, device: GraphDevice
) -> OutputPlan:
    """The same outputs, handed out as ``policy`` says.

    Args:
        recorded: a complete capture.
        plan: its outputs, cloned.
        slots: the values of the capturing call, whose memory has an owner as long as they are here.
        policy: the setting.
        device: where rings are allocated.
    """
    if not policy.lifetime:
        return plan
    generations = Generations(policy.lifetime, policy.too_late(recorded.program.name)) if policy.checked else None
    if not policy.in_place:
        return replace(plan, hand_out=Ring(plan.blocks, policy.lifetime, device), generations=generations)
    roots = recorded.seen.roots
    owners = {maker.block: slots[roots[slot]] for slot, maker in plan.makers.items() if isinstance(maker, Clone)}
    blocks = kept_blocks(plan.blocks, owners)
    return replace(plan, blocks=blocks, hand_out=Lent(), in_place=True, generations=generations)


def captured_slots(program: Program, layout: Layout, below: int) -> set[int]:
    """The slots that captured steps before step ``below`` write."""
    return {slot for number in range(below) if number not in layout.live for slot in program.steps[number].writes}


def borrowed_slots(program: Program, layout: Layout, roots: Sequence[int], captured: set[int]) -> set[int]:
    """The results of live steps that may share memory with a captured value that these steps read."""
    without_owner = set(captured)
    for number in sorted(layout.live):
        step = program.steps[number]
        through = {roots[slot] for slot in step.reads if slot in without_owner and roots[slot] >= 0}
        without_owner.update(slot for slot in step.writes if roots[slot] in through)
    return without_owner - captured


def inputs_written_back(recorded: Recorded, first: int, stop: int) -> list[int]:
    """The inputs copied in and out that the captured steps ``first <= step < stop`` write."""
    candidates = recorded.layout.inputs_bound(Binding.COPIED_BACK)
    if not candidates:
        return []
    roots = recorded.seen.roots
    written = {roots[slot] for step in recorded.program.steps[first:stop] for slot in step.mutates}
    return [index for index in candidates if roots[index] in written]


def padded_inputs_written(recorded: Recorded) -> list[int]:
    """The padded inputs that any step writes, captured or live."""
    roots = recorded.seen.roots
    written = mutated_roots(recorded.program, roots)
    return [index for index in recorded.layout.inputs_bound(Binding.PADDED) if roots[index] in written]
