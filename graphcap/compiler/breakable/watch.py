"""Whether the Python objects that a recording relies on are still there, and where its tensors are now."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from graphcap import native
from graphcap.compiler.breakable.hooked import Hooks
from graphcap.compiler.breakable.key import PLAIN, layout_of
from graphcap.compiler.breakable.state import Found, cell_of, equal_plain, follow, is_tensor


class Watch:
    """Whether what a recording relied on is still there, and no more than that: modules with their ``training`` and
    all that they have, plain values, tensors.

    Attributes:
        hooks: of the modules.
        tensors: what the paths to the tensors lead to, in order; one without a path is kept alive and stays.
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
        self.tensors: list[torch.Tensor] = [found.value for found in tensors]
        modules = [each for each in (*roots(), *(found.value for found in facts)) if isinstance(each, nn.Module)]
        self.hooks = Hooks(modules)
        self._prove = self._proof()

    def holds(self) -> bool:
        """Whether the recording may serve a call now; ``tensors`` are up to date then."""
        if not self.hooks.hold():
            return False
        try:
            if self._prove():
                return True
            roots = self._roots()
            for number, path, expected in self._facts:
                if path is not None and not expected(follow(roots[number], path)):
                    return False
            tensors = [
                follow(roots[number], path) if path is not None else held
                for (number, path, _), held in zip(self._tensors, self.tensors, strict=True)
            ]
        except (LookupError, AttributeError, TypeError):
            return False
        for tensor, (_, _, form) in zip(tensors, self._tensors, strict=True):
            if not is_tensor(tensor) or _form(tensor) != form:
                return False
        self.tensors = tensors
        self._prove = self._proof()
        return True

    def _proof(self) -> Callable[[], bool]:
        """A quick look that nothing on any path has changed, without keeping the roots alive."""
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
        moved = native.address_check(range(len(self.tensors)), [tensor.data_ptr() for tensor in self.tensors])
        at_roots, elsewhere, tensors = list(places), list(others.values()), self.tensors
        current_roots = self._roots  # and not self, or both would live until the next collection

        def prove() -> bool:
            now = current_roots()
            return (
                proven(*[vars(now[number]) for number in at_roots])
                and all((h.cell_contents if k == "cell_contents" else h[k]) is v for h, k, v in elsewhere)
                and moved(tensors)
            )

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
