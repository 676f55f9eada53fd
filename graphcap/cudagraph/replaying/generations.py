"""Outputs that lie in memory of a plan, told when that memory is written again: a check for debugging.

An output is handed out as the plain tensor that it is without the check, so that nothing else changes: no guard, no
recompilation. When a replay is about to write into its memory, the tensor object becomes a :class:`StaleOutput`.
What the caller made of it before, such as a slice, is not followed.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from graphcap.errors import StaleOutputError


class StaleOutput(torch.Tensor):
    """What an output has become when its memory holds other values: whatever is done with it raises."""

    why = ""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise StaleOutputError(cls.why)


class Generations:
    """The outputs of a plan's latest replays that somebody still holds."""

    def __init__(self, lifetime: int, why: str) -> None:
        """Prepare for one plan.

        Args:
            lifetime: which later replay of the plan overwrites an output: the first, the second.
            why: the message of the :class:`graphcap.StaleOutputError`.
        """
        self._lifetime = lifetime
        self._stale: type[torch.Tensor] = type("StaleOutput", (StaleOutput,), {"why": why})
        self._held: deque[list[weakref.ref[torch.Tensor]]] = deque()

    def expire(self) -> None:
        """A replay is about to write into the memory of the oldest outputs."""
        if len(self._held) < self._lifetime:
            return
        for reference in self._held.popleft():
            output = reference()
            if type(output) is torch.Tensor:
                output.__class__ = self._stale

    def hand_out(self, outputs: Sequence[torch.Tensor]) -> None:
        """A replay returns these tensors."""
        self._held.append([weakref.ref(output) for output in outputs])
