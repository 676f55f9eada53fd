"""Which step of a padded call is to blame: two runs of a program, compared step by step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from graphcap.cudagraph.padded.corner import corner
from graphcap.cudagraph.padded.digest import digest
from graphcap.cudagraph.private import storage_address
from graphcap.cudagraph.program import Program
from graphcap.cudagraph.recording.liveness import slot_table


@dataclass(slots=True)
class Trace:
    """What a live run left after each step.

    Attributes:
        results: per step the tensors that it made, cut to the size of the reference run, on the CPU; ``None`` for what
            lies in arguments that are written.
        state: per step, for each tensor that it wrote in place, its size in the reference run and a number that follows
            from all bytes of that part.
    """

    results: list[list[torch.Tensor | None]] = field(default_factory=list)
    state: list[list[tuple[torch.Size, int]]] = field(default_factory=list)


def trace(program: Program, args: Sequence[Any], reference: Trace | None) -> Trace:
    """Run every step live and keep copies.

    Args:
        program: to be run.
        args: which it may write into.
        reference: the run at the exact size; ``None`` is that run.
    """
    found = Trace()
    state = {storage_address(args[slot]) for step in program.steps for slot in step.mutates if slot < len(args)} - {0}
    slots = slot_table(program, args)
    for number, step in enumerate(program.steps):
        for slot, value in zip(step.writes, step.fn(*[slots[slot] for slot in step.reads]), strict=True):
            slots[slot] = value
        made = [_if_made(slots[slot], state) for slot in step.writes]
        sizes = reference.results[number] if reference is not None else [None] * len(made)
        found.results.append([_kept(value, like, reference) for value, like in zip(made, sizes, strict=True)])
        written = [slots[slot] for slot in step.mutates]
        parts = [s for s, _ in reference.state[number]] if reference is not None else [each.shape for each in written]
        found.state.append(
            [(size, digest(corner(each.detach(), size))) for each, size in zip(written, parts, strict=True)]
        )
    return found


def first_departure(
    program: Program,
    one: Trace,
    other: Trace,
    apart: Callable[[torch.Tensor, torch.Tensor], bool],
    *,
    with_state: bool,
) -> str:
    """The name of the first step whose results are apart, or that left other bytes in what it wrote; ``""`` if none."""
    for number, step in enumerate(program.steps):
        pairs = zip(one.results[number], other.results[number], strict=True)
        if any(a is not None and b is not None and a.shape == b.shape and apart(a, b) for a, b in pairs):
            return step.name
        if with_state and one.state[number] != other.state[number]:
            return step.name
    return ""


def _if_made(value: Any, state: Collection[int]) -> Any:
    """A value, ``None`` where it lies in the state: that is looked at as such, and may be too large to be copied."""
    return None if isinstance(value, torch.Tensor) and storage_address(value) in state else value


def _kept(value: Any, like: torch.Tensor | None, reference: Trace | None) -> torch.Tensor | None:
    if not isinstance(value, torch.Tensor):
        return None
    if reference is None:
        return value.detach().to("cpu", copy=True)
    if like is None or like.dim() != value.dim() or any(a > b for a, b in zip(like.shape, value.shape, strict=True)):
        return None
    return corner(value.detach(), like.shape).to("cpu", copy=True)
