"""A warm-up call, run step by step, that learns what a capture must know beforehand: which values share memory."""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from graphcap.cudagraph.dispatch.asked import inputs_asked_for
from graphcap.cudagraph.private import storage_address, storage_range
from graphcap.cudagraph.program import Capture, Constant, InputKind, Program
from graphcap.cudagraph.recording.arena import span_bytes
from graphcap.cudagraph.recording.liveness import StorageTable, num_slots


@dataclass(frozen=True, slots=True)
class Observation:
    """What one live call showed.

    Attributes:
        roots: for each slot the first slot with the same storage; ``-1`` for what is no tensor.
        identity: for each slot the first slot that held the very same object.
        foreign: slots whose tensor cannot be part of a graph, each with the reason.
        needing_grad: slots whose tensor says that it requires grad.
        nbytes: for each input the bytes a copy takes; 0 for what is no tensor.
        signature: what a later call must have in common for all this to hold; see :func:`signature_of`.
        asked: names that the steps which may be captured looked for among the inputs of the ``graphcap.step``.
        asked_live: the same of the other steps.
        is_of_another_size: whether a call of another size showed it; a capture then has more to compare.
    """

    roots: tuple[int, ...]
    identity: tuple[int, ...]
    foreign: Mapping[int, str]
    needing_grad: frozenset[int]
    nbytes: tuple[int, ...]
    signature: tuple[Any, ...]
    asked: frozenset[str]
    asked_live: frozenset[str]
    is_of_another_size: bool = False

    def decisive(self, padded: Container[str]) -> frozenset[str]:
        """The names of step inputs whose presence decides what a plan is good for: what a graph has read or missed, and
        for steps that run live, which look again, only what they get ``padded``."""
        return self.asked | {name for name in self.asked_live if name in padded}

    def at_size_of(
        self, program: Program, args: Sequence[Any], device: torch.device, captured: Collection[int] | None = None
    ) -> Observation | None:
        """What this call showed, taken to hold for one of other sizes; ``None`` where its arguments share memory in
        another way, or are not where they were.

        Whether its results share memory in the same way shows when it is captured: a recording compares that.
        """
        roots, firsts = argument_roots(args), first_holders(args)
        if [*self.roots[: len(args)]] != roots or [*self.identity[: len(args)]] != firsts:
            return None
        nbytes = list(self.nbytes)
        for index, (arg, spec) in enumerate(zip(args, program.inputs, strict=True)):
            if spec.kind is InputKind.TENSOR and roots[index] >= 0:
                nbytes[index] = _copy_bytes(arg)
                if bool(why_foreign(index, arg, device)) != (index in self.foreign):
                    return None
        signature = _signature(program, args, captured, roots, firsts)
        return replace(self, nbytes=tuple(nbytes), signature=signature, is_of_another_size=True)


def observe(
    program: Program, args: Sequence[Any], device: torch.device, captured: Collection[int] | None = None
) -> tuple[Observation, tuple[Any, ...]]:
    """Run every step live, once.

    Args:
        program: the steps.
        args: of the call.
        device: where captured steps find their tensors.
        captured: the steps that may be captured; those that are not NEVER where it is not given.

    Returns:
        What was seen, and the program's outputs.
    """
    table = StorageTable(program)
    roots = [-1] * num_slots(program)
    given, firsts = argument_roots(args), first_holders(args)
    identity = [*firsts, *range(len(args), len(roots))]
    foreign: dict[int, str] = {}
    needing_grad = {index for index, arg in enumerate(args) if isinstance(arg, torch.Tensor) and arg.requires_grad}
    slots: list[Any] = [*args, *[None] * (len(roots) - len(args))]
    for index, root in enumerate(given):
        roots[index] = root
        if root >= 0:
            table.alias(storage_address(args[index]), root)
            foreign |= why_foreign(index, args[index], device)
    captured = _may_be_captured(program) if captured is None else frozenset(captured)
    asked: dict[bool, set[str]] = {True: set(), False: set()}
    for number, step in enumerate(program.steps):
        holders = {id(slots[slot]): identity[slot] for slot in step.reads}
        with inputs_asked_for() as names:
            values = step.fn(*[slots[slot] for slot in step.reads])
        asked[number in captured] |= names
        for slot, value in zip(step.writes, values, strict=True):
            slots[slot] = value
            roots[slot] = table.add(slot, value)
            if roots[slot] >= 0:
                identity[slot] = holders.setdefault(id(value), slot)
                foreign |= why_foreign(slot, value, device)
                needing_grad.update([slot] if value.requires_grad else [])
        for slot in table.expire(number):
            slots[slot] = None
    nbytes = tuple(_copy_bytes(arg) for arg in args)
    signature = _signature(program, args, captured, given, firsts)
    seen = Observation(
        tuple(roots), tuple(identity), foreign, frozenset(needing_grad), nbytes, signature,
        frozenset(asked[True]), frozenset(asked[False]),
    )  # fmt: skip
    return seen, tuple(each.value if isinstance(each, Constant) else slots[each] for each in program.outputs)


def signature_of(program: Program, args: Sequence[Any], captured: Collection[int] | None = None) -> tuple[Any, ...]:
    """Layout of the tensors that may differ from call to call, and how arguments share memory.

    What only live steps read may have another size on every call (a cache that grows) and does not count.
    """
    return _signature(program, args, captured, argument_roots(args), first_holders(args))


def _signature(
    program: Program, args: Sequence[Any], captured: Collection[int] | None, roots: list[int], firsts: list[int]
) -> tuple[Any, ...]:
    shared = tuple(
        (index, root, args[index].data_ptr() - args[root].data_ptr())
        for index, root in enumerate(roots)
        if root not in (-1, index)
    )
    same = tuple((index, first) for index, first in enumerate(firsts) if first != index)
    return layouts_of(program, args, captured), shared, same


def layouts_of(program: Program, args: Sequence[Any], captured: Collection[int] | None = None) -> tuple[Any, ...]:
    """Size, strides and dtype of the tensors that captured steps read and that may differ from call to call."""
    if captured is None:
        captured = _may_be_captured(program)
    read = {slot for number in captured for slot in program.steps[number].reads}
    return tuple(
        (arg.size(), arg.stride() if arg.layout is torch.strided else None, arg.dtype) if torch.is_tensor(arg) else None
        for index, (arg, spec) in enumerate(zip(args, program.inputs, strict=True))
        if spec.kind is InputKind.TENSOR and index in read
    )


def _may_be_captured(program: Program) -> frozenset[int]:
    return frozenset(number for number, step in enumerate(program.steps) if step.capture is not Capture.NEVER)


def first_holders(args: Sequence[Any]) -> list[int]:
    """For each argument the first one that is the very same tensor; an argument that is no tensor is its own."""
    holders: dict[int, int] = {}
    return [
        holders.setdefault(id(arg), index) if isinstance(arg, torch.Tensor) else index for index, arg in enumerate(args)
    ]


def argument_roots(args: Sequence[Any]) -> list[int]:
    """For each argument one of those whose storage overlaps its own, the same for all of them; ``-1`` for no tensor."""
    roots = [index if isinstance(arg, torch.Tensor) else -1 for index, arg in enumerate(args)]
    ranges = []
    for index, root in enumerate(roots):
        if root >= 0 and (place := storage_range(args[index]))[0]:
            ranges.append((*place, index))
    end, first = -1, -1
    for start, stop, index in sorted(ranges):
        first = index if start >= end else first
        end = max(end, stop)
        roots[index] = first
    return roots


def _copy_bytes(arg: Any) -> int:
    return span_bytes(arg) if isinstance(arg, torch.Tensor) and arg.layout is torch.strided else 0


def why_foreign(slot: int, tensor: torch.Tensor, device: torch.device) -> dict[int, str]:
    """The slot and why its tensor cannot be part of a graph; empty where it can."""
    if tensor.device != device:
        return {slot: f"is on {tensor.device}, the graph is on {device}"}
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
        return {slot: f"is a {type(tensor).__name__} with layout {tensor.layout}"}
    if tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        return {slot: "is quantized, or a lazily conjugated or negated tensor"}
    return {}
