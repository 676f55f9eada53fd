"""The Python objects that a recorded call relies on: where its tensors are found, and what must stay as it was.

Objects are reached from a few roots: the module, the object or the function that is compiled, and arguments that are
objects of their own. A path leads from a root through attributes, dict entries, list items and closures.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch

from graphcap import native
from graphcap.compiler.breakable.key import PLAIN, layout_of, plain_key

#: ``("attribute", name)``, ``("item", key)``, ``("cell", name)`` or ``("global", name)``.
Step = tuple[str, Any]
Path = tuple[Step, ...]

_MAX_OBJECTS = 200_000
_OF_TORCH = ("_modules", "_parameters", "_buffers")
_MISSING = object()


@dataclass(frozen=True, slots=True)
class Found:
    """An object, and the path to it from root number ``root``; ``path=None`` for a tensor that no path leads to."""

    root: int
    path: Path | None
    value: Any

    @property
    def name(self) -> str:
        """As a user would write it: ``"layers.0.fc.weight"``."""
        return ".".join(str(key) for _, key in self.path or () if key not in _OF_TORCH)


def walk(roots: Sequence[Any]) -> Iterator[Found]:
    """Everything within reach of the roots, nearest first, each object once; not the roots themselves."""
    seen = {id(root) for root in roots}
    queue: deque[tuple[int, Path, Any]] = deque((number, (), root) for number, root in enumerate(roots))
    while queue and len(seen) < _MAX_OBJECTS:
        number, path, holder = queue.popleft()
        for step, value in _children(holder):
            yield Found(number, (*path, step), value)
            if id(value) not in seen and _has_children(value):
                seen.add(id(value))
                queue.append((number, (*path, step), value))


def _has_children(value: Any) -> bool:
    if isinstance(value, (dict, list, tuple)):
        return True
    return (
        not isinstance(value, (*PLAIN, torch.Tensor, type)) and not callable_only(value) and hasattr(value, "__dict__")
    )


def callable_only(value: Any) -> bool:
    """Functions, methods and Python modules: what lies behind them is not looked at."""
    return type(value).__name__ in ("function", "method", "builtin_function_or_method", "module", "partial")


def _children(holder: Any) -> list[tuple[Step, Any]]:
    if isinstance(holder, dict):
        return [(("item", key), value) for key, value in list(holder.items())]
    if isinstance(holder, (list, tuple)):
        return [(("item", index), value) for index, value in enumerate(holder)]
    if isinstance(holder, FunctionType):
        free = holder.__code__.co_freevars
        cells = [(("cell", name), _cell(holder, name)) for name in free]
        used = [(("global", n), holder.__globals__[n]) for n in _names_used(holder) if n in holder.__globals__]
        return [*cells, *used]
    if not hasattr(holder, "__dict__"):
        return []
    return [(("attribute", name), value) for name, value in list(vars(holder).items()) if name != "_compiled_call_impl"]


def _names_used(function: FunctionType) -> list[str]:
    codes, names = [function.__code__], []
    while codes:
        code = codes.pop()
        names += code.co_names
        codes += [const for const in code.co_consts if hasattr(const, "co_names")]
    return list(dict.fromkeys(names))


def _cell(function: FunctionType, name: str) -> Any:
    """What a closure holds under a name, ``None`` where it holds nothing yet."""
    try:
        return _cell_of(function, name).cell_contents
    except ValueError:
        return None


def _cell_of(function: FunctionType, name: str) -> Any:
    assert function.__closure__ is not None
    return function.__closure__[function.__code__.co_freevars.index(name)]


def follow(root: Any, path: Path) -> Any:
    """What a path leads to now.

    Raises:
        LookupError: it leads nowhere any more.
    """
    value = root
    for kind, key in path:
        if kind == "item":
            value = value[key]
        elif kind == "attribute":
            value = vars(value)[key]
        elif kind == "cell":
            value = _cell(value, key)
        else:
            value = value.__globals__[key]
    return value


def snapshot(roots: Sequence[Any]) -> dict[tuple[int, Path], Any]:
    """Everything within reach, by where it is: to be compared with a later one by :func:`changed`."""
    return {(found.root, found.path): found.value for found in walk(roots)}


def changed(before: Mapping[tuple[int, Path], Any], after: Mapping[tuple[int, Path], Any]) -> str:
    """The name of something that a call has set to another value, ``""`` if there is none."""
    for where in dict.fromkeys((*before, *after)):
        old, new = before.get(where, _MISSING), after.get(where, _MISSING)
        if old is not new and not _equal_plain(old, new):
            if (
                new is not _MISSING
                and _has_children(new)
                and type(old) is type(new)
                and isinstance(new, (list, tuple, dict))
            ):
                continue  # a container that was made anew: what is in it counts
            return Found(where[0], where[1], new).name
    return ""


def _equal_plain(a: Any, b: Any) -> bool:
    return isinstance(a, PLAIN) and isinstance(b, PLAIN) and plain_key(a) == plain_key(b)


class Watch:
    """Whether what a recording relied on is still there: modules and their ``training``, plain values, tensors.

    Attributes:
        tensors: what the paths to the tensors lead to, in order; one without a path is kept alive and stays.
    """

    def __init__(self, roots: Callable[[], Sequence[Any]], tensors: Sequence[Found], facts: Sequence[Found]) -> None:
        """Remember how things are.

        Args:
            roots: gives the roots; they are not kept alive.
            tensors: the tensors to find again. One that was replaced by another of the same layout is taken.
            facts: what must stay equal (plain values) or the same object.
        """
        self._roots = roots
        self._tensors = [(found.root, found.path, layout_of(found.value)) for found in tensors]
        self._facts = [(found.root, found.path, _fact(found.value)) for found in facts]
        self.tensors: list[torch.Tensor] = [found.value for found in tensors]
        self._prove = self._proof()

    def holds(self) -> bool:
        """Whether the recording may serve a call now; ``tensors`` are up to date then."""
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
        for tensor, (_, _, layout) in zip(tensors, self._tensors, strict=True):
            if not isinstance(tensor, torch.Tensor) or layout_of(tensor) != layout:
                return False
        self.tensors = tensors
        self._prove = self._proof()
        return True

    def _proof(self) -> Callable[[], bool]:
        """A quick look that nothing on any path has changed, without keeping the roots alive."""
        roots = self._roots()
        entries: dict[tuple[int, Any], tuple[dict[Any, Any], Any, Any]] = {}
        others: dict[tuple[int, Any], tuple[Any, Any, Any]] = {}
        first: dict[tuple[int, Any], Any] = {}
        for number, path in [each[:2] for each in (*self._tensors, *self._facts)]:
            holder = roots[number]
            for depth, (kind, key) in enumerate(path or ()):
                value = follow(holder, ((kind, key),))
                if depth == 0 and kind == "attribute":
                    first[number, key] = value
                elif kind == "cell":
                    others[id(holder), key] = _cell_of(holder, key), "cell_contents", value
                elif kind == "item" and not isinstance(holder, dict):
                    others[id(holder), key] = holder, key, value
                else:
                    held = vars(holder) if kind == "attribute" else holder.__globals__ if kind == "global" else holder
                    entries[id(held), key] = held, key, value
                holder = value
        proven = native.identity_check(list(entries.values()))
        moved = native.address_check(range(len(self.tensors)), [tensor.data_ptr() for tensor in self.tensors])
        at_roots, elsewhere, tensors = list(first.items()), list(others.values()), self.tensors
        current_roots = self._roots  # and not self, or both would live until the next collection

        def prove() -> bool:
            now = current_roots()
            return (
                all(vars(now[number]).get(name, _MISSING) is value for (number, name), value in at_roots)
                and proven()
                and all((h.cell_contents if k == "cell_contents" else h[k]) is v for h, k, v in elsewhere)
                and moved(tensors)
            )

        return prove


def _fact(value: Any) -> Callable[[Any], bool]:
    if isinstance(value, PLAIN):
        return lambda now: _equal_plain(value, now)
    try:
        known = weakref.ref(value)
    except TypeError:
        return lambda now: now is value
    return lambda now: now is known()
