"""Whether the Python objects that a recording relies on are still there, and where its tensors are now."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn

from graphcap import native
from graphcap.compiler.breakable.hooked import Hooks
from graphcap.compiler.breakable.key import PLAIN, layout_of
from graphcap.compiler.breakable.state import Found, cell_of, equal_plain, follow, is_tensor


class Watch:
    """Whether what a recording relied on is still there, and no more than that: modules with their ``training`` and
    all that they have, plain values, tensors.

    Keeps no tensor alive to which a path leads: a model that goes to sleep gives its weights back.
    """

    def __init__(self, roots: Callable[[], Sequence[Any]], tensors: Sequence[Found], facts: Sequence[Found]) -> None:
        """Remember how things are.

        Args:
            roots: gives the roots; they are not kept alive.
            tensors: the tensors to find again. One that was replaced by another of the same class and layout is taken.
            facts: what must stay equal (plain values), keep its keys (dicts) or stay the same object.
        """
        self._roots = roots
        self._tensors = [(found.root, found.path, _form(found.value)) for found in tensors]
        self._facts = [(found.root, found.path, _fact(found.value)) for found in facts]
        self._kept = [found.value if found.path is None else None for found in tensors]
        modules = [each for each in (*roots(), *(found.value for found in facts)) if isinstance(each, nn.Module)]
        self._modules = [weakref.ref(module) for module in modules]
        self._hooks = Hooks(modules)
        self._prove = self._proof([found.value for found in tensors])

    @property
    def is_over(self) -> bool:
        """Whether no call will ever be served again: a module is gone, or a hook was at the last look."""
        return self._hooks.are_lost or any(module() is None for module in self._modules)

    @property
    def tensors(self) -> list[torch.Tensor | None]:
        """What they led to when :meth:`find` last looked, ``None`` for what is gone."""
        return [each() for each in self._latest]

    def find(self) -> list[torch.Tensor] | None:
        """What the paths to the tensors lead to now, in order; ``None`` where the recording may not serve a call. It is
        for the caller to keep them for as long as the call takes."""
        if not self._hooks.hold():
            return None
        try:
            if (proven := self._prove()) is not None:
                return proven
            roots = self._roots()
            for number, path, expected in self._facts:
                if path is not None and not expected(follow(roots[number], path)):
                    return None
            tensors: list[Any] = [
                follow(roots[number], path) if path is not None else kept
                for (number, path, _), kept in zip(self._tensors, self._kept, strict=True)
            ]
        except (LookupError, AttributeError, TypeError):
            return None
        for tensor, (_, _, form) in zip(tensors, self._tensors, strict=True):
            if not is_tensor(tensor) or _form(tensor) != form:
                return None
        self._prove = self._proof(tensors)
        return tensors

    def _proof(self, tensors: Sequence[torch.Tensor]) -> Callable[[], list[torch.Tensor] | None]:
        """A quick look that nothing on any path has changed, without keeping the roots and the tensors alive."""
        roots = self._roots()
        entries: dict[tuple[int, Any], tuple[dict[Any, Any] | int, Any, Any]] = {}
        others: dict[tuple[int, Any], tuple[Any, Any, Any]] = {}
        sized: dict[int, dict[Any, Any]] = {}
        places: dict[int, int] = {}  # by root: which of the check's arguments its own dict is
        for number, path in [each[:2] for each in (*self._tensors, *self._facts)]:
            holder = roots[number]
            for depth, (kind, key) in enumerate(path or ()):
                value = follow(holder, ((kind, key),))
                if depth == 0 and kind == "attribute":
                    place = places.setdefault(number, len(places))
                    entries[~place, key] = place, key, value
                elif kind == "cell":
                    others[id(holder), key] = cell_of(holder, key), "cell_contents", value
                elif kind == "item" and not isinstance(holder, dict):
                    others[id(holder), key] = holder, key, value
                else:
                    held = vars(holder) if kind == "attribute" else holder.__globals__ if kind == "global" else holder
                    entries[id(held), key] = held, key, value
                holder = value
            if isinstance(holder, dict):
                sized[id(holder)] = holder
        proven = native.identity_check(list(entries.values()), list(sized.values()))
        moved = native.address_check(range(len(tensors)), [tensor.data_ptr() for tensor in tensors])
        at_roots, elsewhere = list(places), list(others.values())
        latest = self._latest = [weakref.ref(tensor) for tensor in tensors]
        current_roots = self._roots  # and not self, or both would live until the next collection

        def prove() -> list[torch.Tensor] | None:
            now = current_roots()
            if not proven(*[vars(now[number]) for number in at_roots]):
                return None
            if not all((h.cell_contents if k == "cell_contents" else h[k]) is v for h, k, v in elsewhere):
                return None
            found = cast(list[torch.Tensor], [*map(operator.call, latest)])  # alive, as they are where they were
            return found if moved(found) else None

        return prove


def _form(tensor: torch.Tensor) -> tuple[Any, ...]:
    return type(tensor), *layout_of(tensor)


def _fact(value: Any) -> Callable[[Any], bool]:
    if isinstance(value, PLAIN):
        return lambda now: equal_plain(value, now)
    if isinstance(value, dict):
        keys = list(value)
        return lambda now: isinstance(now, dict) and list(now) == keys
    try:
        known = weakref.ref(value)
    except TypeError:
        return lambda now: now is value
    return lambda now: now is known()
