"""The inputs of a graph that come out of the module tree: parameters, buffers, plain attributes.

Dynamo's code fetches each of them anew on every call, walking ``self._modules['layers']._modules['0']...``. Here they
are fetched once, and a call proves that nothing on the way has changed: every dict that the walk went through still
holds the very object that it held. The dicts at its beginning are the caller's to fetch, as they belong to an object
that must not be kept alive.

What is kept alive: the tensors, and the dicts of the submodules. So a parameter that was replaced lives until the next
call (which fetches again), or until what owns the :class:`Statics` dies.
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch

from graphcap import native

#: ``("attribute", name)`` or ``("item", key)``.
Step = tuple[str, Any]
#: One entry of :func:`graphcap.native.identity_check`: ``holder[key] is value``.
Entry = tuple[dict[Any, Any], Any, Any]

#: When each of so many changes comes before so many calls were served, fetching is cheaper than proving.
MAX_CHANGES, FEW_CALLS = 4, 100


class Statics:
    """Fetches the static inputs of a call, or proves that they are still those of the last one.

    Attributes:
        num_changes: how often in a row they were kept for only a few calls.
    """

    def __init__(self, fetch: Callable[..., list[Any]], paths: Sequence[tuple[int, int, tuple[Step, ...]]]) -> None:
        """Fetch nothing yet.

        Args:
            fetch: takes the dicts (or other objects) at the beginning of the walks, and returns the argument list of
                the graph with ``None`` for what is not static.
            paths: for each static input its position in that list, the number of the object where its walk begins, and
                the steps from there.
        """
        self._fetch = fetch
        self._paths = tuple(paths)
        self._known: tuple[Callable[[], bool], tuple[Any, ...], list[Any]] | None = None
        self._num_served = 0
        self.num_changes = 0

    def __call__(self, *begin: Any) -> list[Any]:
        """A fresh argument list with the static inputs filled in."""
        known = self._known
        if known is not None:
            unchanged, begun, values = known
            if all(map(operator.is_, begin, begun)) and unchanged():
                self._num_served += 1
                return values.copy()
        values = self._fetch(*begin)
        if self.num_changes < MAX_CHANGES and native.status() == "extension":
            self._keep(begin, values)
        return values

    def _keep(self, begin: tuple[Any, ...], values: list[Any]) -> None:
        entries: dict[tuple[int, Any], Entry] = {}
        for position, number, steps in self._paths:
            reached = begin[number]
            for entry in walk(reached, steps):
                entries[id(entry[0]), entry[1]] = entry
                reached = entry[2]
            if reached is not values[position]:  # changed meanwhile by another thread
                return
        self.num_changes = self.num_changes + 1 if self._num_served < FEW_CALLS else 0
        self._num_served = 0
        self._known = native.identity_check(list(entries.values())), begin, values.copy()


def walk(begin: Any, steps: Sequence[Step]) -> Iterator[Entry]:
    """The dict entries that decide where a walk leads.

    Raises:
        LookupError: a step is decided by something else: a property, ``__getattr__``, a list.
    """
    reached = begin
    for kind, key in steps:
        holder = _attributes(reached, key) if kind == "attribute" else reached
        if type(holder) not in (dict, OrderedDict) or key not in holder:
            raise LookupError(f"{kind} {key!r} of a {type(reached).__name__}")
        reached = holder[key]
        yield holder, key, reached


def leads_to_tensor(begin: Any, steps: Sequence[Step]) -> bool:
    """Whether dict entries alone decide where a walk leads, and that is a tensor."""
    reached = begin
    try:
        for entry in walk(begin, steps):
            reached = entry[2]
    except LookupError:
        return False
    return bool(steps) and isinstance(reached, torch.Tensor)


def _attributes(owner: Any, name: str) -> Any:
    """The dict where the attribute of an object is found, ``None`` where its class has a say in it."""
    cls = type(owner)
    found = next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), None)
    lookup: Any = cls.__getattribute__
    if lookup not in (object.__getattribute__, ModuleType.__getattribute__) or hasattr(type(found), "__set__"):
        return None
    return getattr(owner, "__dict__", None)
