"""Calls that no guard on arguments can tell from an earlier one.

All that such guards look at, where the arguments are plain tensors and simple constants, is the layout of each tensor
(type, dtype, device, sizes, strides, ``requires_grad``, the dispatch keys in force) and the constants. Where the guards
held once, they hold for every call with the same layout, and so does the check of declared dims. To compare layouts
takes a quarter of a microsecond; the tree of guards takes three when the processor has it in its caches, and twelve
between two replays, when it has not (measured beside an H200, torch 2.11).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphcap import native
from graphcap.compiler.frontend import plain_call
from graphcap.native.objects import Question

_MAX_LAYOUTS = 256  #: that are remembered for one graph
_TENSORS = (Tensor, torch.nn.Parameter)
_CONSTANTS = (type(None), bool, int, str)


@dataclass(frozen=True, slots=True)
class _Layout:
    """The arguments of one call, as far as guards can see them."""

    tensors: tuple[int, ...]  #: the indices of tensors
    constants: tuple[tuple[int, Any], ...]  #: index and value of the others
    check: Callable[..., bool]  #: of the tensors
    fits: Callable[..., bool]  #: of all values

    @classmethod
    def of(cls, values: tuple[Any, ...], tensors: tuple[int, ...]) -> _Layout:
        """The layout of these values."""
        others = tuple((i, value) for i, value in enumerate(values) if i not in tensors)
        check = native.layout_check([values[index] for index in tensors])
        return cls(tensors, others, check, _fits(others, tensors, check) if others else check)


def _fits(
    constants: tuple[tuple[int, Any], ...], tensors: tuple[int, ...], check: Callable[..., bool]
) -> Callable[..., bool]:
    def fits(*values: Any) -> bool:
        for index, constant in constants:
            value = values[index]
            if type(value) is not type(constant) or value != constant:
                return False
        return check(*[values[index] for index in tensors])

    return fits


class SameLayout:
    """The layouts for which the guards on arguments of one graph have held."""

    def __init__(self, ambient: Sequence[Question], guards: Any) -> None:
        """Know none.

        Args:
            ambient: guards on torch's modes; they are asked on every call.
            guards: a weak reference to what Dynamo keeps of them all; without a ``cache_entry`` when it is dropped.
        """
        self._ambient = ambient
        self._around: Callable[[], bool]
        self._guards = guards
        self._known: dict[Hashable, _Layout] = {}
        self._latest: _Layout | None = None
        self._count = -1
        self._ask_anew()
        native.when_ready(self, SameLayout._ask_anew)

    def __call__(self, values: tuple[Any, ...]) -> bool:
        """Whether a call from plain Python with these would find that the guards on arguments hold. False also means:
        not known."""
        if len(values) != self._count or not self._around():
            return False
        layout = self._latest
        if layout is None or not layout.fits(*values):
            layout = self._known.get(_outline(values))
            if layout is None or not layout.fits(*values):
                return False
            self._latest = layout
        guards = self._guards()
        if guards is None or guards.cache_entry is None:
            return False
        for index in layout.tensors:  # noqa: SIM110 - a generator takes longer
            if values[index].__dict__:
                return False  # Dynamo looks at some attributes: at a dim that the user marks as dynamic
        return True

    def _ask_anew(self) -> None:
        self._around = native.answer_check([*plain_call.plain_questions(), *self._ambient])

    def learn(self, values: tuple[Any, ...]) -> None:
        """The guards, those on torch's modes as well, have held for these in a call from plain Python."""
        if not self._around():
            self._ask_anew()  # in other modes than the last time
        tensors = tuple(i for i, value in enumerate(values) if type(value) in _TENSORS)
        known = self._known.get(_outline(values))
        if known is not None and len(values) == self._count and known.fits(*values):
            return
        if not tensors or not all(type(value) in _CONSTANTS for i, value in enumerate(values) if i not in tensors):
            return
        if any(values[index].__dict__ for index in tensors):
            return  # the guards have seen more than will be compared
        if len(self._known) >= _MAX_LAYOUTS or len(values) != self._count:
            self._known.clear()
        self._count = len(values)
        self._latest = self._known[_outline(values)] = _Layout.of(values, tensors)


def _outline(values: tuple[Any, ...]) -> Hashable:
    """Something short that is the same for equal layouts."""
    return tuple([v.shape if isinstance(v, Tensor) else v if type(v) in _CONSTANTS else None for v in values])
