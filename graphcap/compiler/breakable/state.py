"""The Python objects that a call can reach: where its tensors lie, and what it has changed.

Objects are reached from a few roots: the module, the object or the function that is compiled, and arguments that are
objects of their own. A path leads from a root through attributes, dict entries, list items and closures.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch

from graphcap.compiler.breakable.key import PLAIN, plain_key

#: ``("attribute", name)``, ``("item", key)``, ``("cell", name)`` or ``("global", name)``.
Step = tuple[str, Any]
Path = tuple[Step, ...]

_MAX_OBJECTS = 200_000
#: What a module has, by name.
TABLES = ("_modules", "_parameters", "_buffers")
MISSING = object()


@dataclass(frozen=True, slots=True)
class Found:
    """An object, and the path to it from root number ``root``; ``path=None`` for a tensor that no path leads to."""

    root: int
    path: Path | None
    value: Any

    @property
    def name(self) -> str:
        """As a user would write it: ``"layers.0.fc.weight"``."""
        return ".".join(str(key) for _, key in self.path or () if key not in TABLES)


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


def is_tensor(value: Any) -> bool:
    """Whether an object is a tensor by its type: a ``Mock(spec=Tensor)``, which some package may leave within reach,
    says of itself that it is one."""
    return issubclass(type(value), torch.Tensor)


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
    codes = [function.__code__]
    names: list[str] = []
    while codes:
        code = codes.pop()
        names += code.co_names
        codes += [const for const in code.co_consts if hasattr(const, "co_names")]
    return list(dict.fromkeys(names))


def _cell(function: FunctionType, name: str) -> Any:
    """What a closure holds under a name, ``None`` where it holds nothing yet."""
    try:
        return cell_of(function, name).cell_contents
    except ValueError:
        return None


def cell_of(function: FunctionType, name: str) -> Any:
    """The cell of a closure that holds the variable of this name."""
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
    return {(found.root, found.path or ()): found.value for found in walk(roots)}


def changed(before: Mapping[tuple[int, Path], Any], after: Mapping[tuple[int, Path], Any]) -> Found | None:
    """Something that a call has set to another value, ``None`` if there is nothing."""
    for where in dict.fromkeys((*before, *after)):
        old, new = before.get(where, MISSING), after.get(where, MISSING)
        if old is not new and not equal_plain(old, new):
            if (
                new is not MISSING
                and _has_children(new)
                and type(old) is type(new)
                and isinstance(new, (list, tuple, dict))
            ):
                continue  # a container that was made anew: what is in it counts
            return Found(where[0], where[1], None)
    return None


def equal_plain(a: Any, b: Any) -> bool:
    """Whether two values are plain and mean the same."""
    return isinstance(a, PLAIN) and isinstance(b, PLAIN) and plain_key(a) == plain_key(b)
