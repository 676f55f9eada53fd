"""When a value's memory may be reused: after the last reader of the value *and of every view of it*."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphcap.cudagraph.private import storage_address
from graphcap.cudagraph.program import Program


def num_slots(program: Program) -> int:
    """The size of the slot table."""
    return 1 + max([len(program.inputs) - 1, *(slot for step in program.steps for slot in step.writes)])


def slot_table(program: Program, args: Sequence[Any]) -> list[Any]:
    """The slots before the first step: the arguments, and nothing yet of what the steps make."""
    return [*args, *[None] * (num_slots(program) - len(args))]


def last_reads(program: Program) -> list[int]:
    """For each slot the index of the last step that reads it.

    A program output is read at ``len(steps)``; a value that nobody reads dies where it is written; an unread input
    is ``-1``.
    """
    last = [-1] * num_slots(program)
    for index, step in enumerate(program.steps):
        for slot in (*step.reads, *step.writes):
            last[slot] = index
    for output in program.outputs:
        if isinstance(output, int):
            last[output] = len(program.steps)
    return last


def mutated_roots(program: Program, roots: Sequence[int]) -> set[int]:
    """The storages that a step writes into in place, each by the first slot that lies in it (``roots[slot]``)."""
    return {roots[slot] for step in program.steps for slot in step.mutates}


def releases(program: Program, roots: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """For each step the slots whose memory nobody reads after it. Inputs and values that share theirs never appear.

    Args:
        program: the steps.
        roots: for each slot the first slot with the same storage, ``-1`` for what is no tensor.
    """
    last = last_reads(program)
    last_of_root: dict[int, int] = {}
    for slot, root in enumerate(roots):
        last_of_root[root] = max(last_of_root.get(root, -1), last[slot])
    after: list[list[int]] = [[] for _ in program.steps]
    for slot, root in enumerate(roots):
        dies = last_of_root[root]
        if root >= len(program.inputs) and dies < len(program.steps):
            after[dies].append(slot)
    return tuple(map(tuple, after))


class StorageTable:
    """Which slots share a storage, learned while the steps run. A storage is forgotten with its last reader, because
    its address may then belong to another one."""

    def __init__(self, program: Program) -> None:
        self._num_inputs = len(program.inputs)
        self._last_reads = last_reads(program)
        self._root_at: dict[int, int] = {}
        self._last_of_root: dict[int, int] = {}
        self._slots_of_root: dict[int, list[int]] = {}

    def alias(self, address: int, root: int) -> None:
        """Let the storage at ``address`` count as that of slot ``root``."""
        if address:
            self._root_at[address] = root

    def add(self, slot: int, value: Any) -> int:
        """Note a new value; return the first slot with the same storage, ``-1`` when it is no tensor."""
        if not isinstance(value, torch.Tensor):
            return -1
        address = storage_address(value)
        root = self._root_at.setdefault(address, slot) if address else slot
        self._last_of_root[root] = max(self._last_of_root.get(root, -1), self._last_reads[slot])
        self._slots_of_root.setdefault(root, []).append(slot)
        return root

    def expire(self, step: int) -> list[int]:
        """The slots whose memory nobody reads after ``step``, inputs excepted."""
        over = [root for root, last in self._last_of_root.items() if last <= step and root >= self._num_inputs]
        for root in over:
            del self._last_of_root[root]
        self._root_at = {at: root for at, root in self._root_at.items() if root not in over} if over else self._root_at
        return [slot for root in over for slot in self._slots_of_root.pop(root)]
