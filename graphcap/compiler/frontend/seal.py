"""``guards="sealed"``: what is known about the Python state under a graph, and when it has to be looked at again.

On every call a seal holds or not. It holds while every module has its ``training``, its submodules, parameters, buffers
and hooks, and no attribute more or less than before, no argument is one of the tensors in there, no plan was made and
fewer than 255 calls went by. Then the parameters are those of the last call as well: nothing is fetched.

Otherwise all guards are evaluated. Where they hold, a new seal begins. Where they do not, and something has changed
that the seal covers, the call is for Dynamo to decide, as with ``guards="full"``. Where they do not and nothing of that
has changed, something changed unseen, a plain attribute or a global: that is a :class:`~graphcap.errors.GuardError`.

Without the C++ checks a look at everything costs more than the guards, which are evaluated on every call then.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import nn

from graphcap import native
from graphcap.compiler.frontend.guards import Guards
from graphcap.compiler.frontend.statics import FEW_CALLS, MAX_CHANGES, Entry, Step, walk
from graphcap.cudagraph import plans_made
from graphcap.errors import GuardError

#: All guards are evaluated at every call of this number.
EVERY = 256

_STATE = ("training", "_parameters", "_buffers", "_modules")
_HELD = ("_parameters", "_buffers", "_modules")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")  # registered where there were none: see hooks.py


class StaticInput(NamedTuple):
    """An input of the graph that comes out of a module."""

    position: int  #: among the graph's arguments
    root: int  #: the number of the module where the walk begins
    steps: tuple[Step, ...]


class _Root(NamedTuple):
    """What is expected of a module's own dict, which is not to be kept alive: the module may own the seal."""

    module: weakref.ref[nn.Module]
    num_attributes: int
    names: tuple[str, ...]
    values: tuple[Any, ...]

    def holds(self, module: nn.Module) -> bool:
        attributes = module.__dict__
        return (
            self.module() is module
            and len(attributes) == self.num_attributes
            and all(map(operator.is_, map(attributes.get, self.names), self.values))
        )


class _Known(NamedTuple):
    """A seal: what has to be unchanged, and the graph's arguments as long as it is."""

    roots: tuple[_Root, ...]
    below: Callable[[], bool]
    values: list[Any]
    ids: frozenset[int]

    def holds(self, roots: Sequence[nn.Module]) -> bool:
        return self.below() and all(map(_Root.holds, self.roots, roots))


class Seal:
    """The state under one graph."""

    def __init__(self, name: str, guards: Guards, statics: Sequence[StaticInput], num_arguments: int) -> None:
        """Know nothing yet.

        Args:
            name: of the target, for errors.
            guards: all guards of the graph.
            statics: its inputs that are proved instead of fetched.
            num_arguments: how many it has in all.
        """
        self._name = name
        self._guards = guards
        self._statics = tuple(statics)
        self._num_arguments = num_arguments
        self._known: _Known | None = None
        self._remaining = EVERY - 1
        self._plans = -1
        self._num_served = 0
        self._num_changes = 0

    @property
    def is_closed(self) -> bool:
        """Whether calls go by that evaluate only the guards on arguments."""
        return self._known is not None

    def __call__(self, ids: Sequence[int], *roots: nn.Module) -> list[Any] | None:
        """A fresh argument list with the static inputs filled in; ``None`` where the seal does not hold.

        Args:
            ids: of the tensors that must not be among the static inputs.
            roots: the modules, as the frame finds them.
        """
        known = self._known
        if (
            known is not None
            and self._remaining > 0
            and self._plans == plans_made.count
            and known.ids.isdisjoint(ids)
            and known.holds(roots)
        ):
            self._remaining -= 1
            return known.values.copy()
        return None

    def renew(self, f_locals: dict[str, Any], ids: Sequence[int], *roots: nn.Module) -> list[Any] | None:
        """The same where the seal does not hold and the guards on arguments do; ``None`` where all guards decide.

        Raises:
            GuardError: a guard on what no seal covers fails.
        """
        if self._num_changes >= MAX_CHANGES or native.status() != "extension":
            return None
        self._num_served += EVERY - 1 - self._remaining
        self._remaining = EVERY - 1
        known, plans = self._known, plans_made.count
        holds = known is not None and known.holds(roots)
        if not self._guards(f_locals):
            self._known = None
            if holds and known is not None and known.ids.isdisjoint(ids):
                self._raise(f_locals)
            return None
        if known is None or not holds:
            known = self._known = self._look(roots)
        self._plans = plans
        return None if known is None else known.values.copy()

    def _look(self, roots: Sequence[nn.Module]) -> _Known | None:
        """Everything as it is now; ``None`` where dict entries alone do not lead to an input."""
        self._num_changes = self._num_changes + 1 if self._num_served < FEW_CALLS else 0
        self._num_served = 0
        entries: dict[tuple[int, Any], Entry] = {}
        sized: list[dict[Any, Any]] = []
        for root in roots:
            for holder in _dicts_of(root):
                entries |= {(id(holder), key): (holder, key, value) for key, value in holder.items()}
                sized.append(holder)
            for module in root.modules():
                own = vars(module)
                entries |= {(id(own), name): (own, name, own[name]) for name in _STATE if name in own}
                sized.append(own)
        values: list[Any] = [None] * self._num_arguments
        try:
            for static in self._statics:
                for entry in walk(roots[static.root], static.steps):
                    entries[id(entry[0]), entry[1]] = entry
                    values[static.position] = entry[2]
        except LookupError:
            return None
        own_dicts = {id(vars(root)) for root in roots}
        below = native.identity_check(
            [entry for entry in entries.values() if id(entry[0]) not in own_dicts],
            [holder for holder in sized if id(holder) not in own_dicts],
        )
        found = tuple(_root(root, entries.values()) for root in roots)
        return _Known(found, below, values, frozenset(id(values[static.position]) for static in self._statics))

    def _raise(self, f_locals: dict[str, Any]) -> None:
        if guard := self._guards.failing(f_locals):
            raise GuardError(
                f"{self._name}: the compiled code relies on something that has changed since it was traced: {guard}. "
                f"With guards='sealed' this is looked at when a plan is made and at every {EVERY}th call, so calls "
                "before this one may have run without the change. The next call is traced anew. If it is meant to "
                "change while the model is in use, compile with guards='full'."
            )


def _dicts_of(root: nn.Module) -> Iterator[dict[Any, Any]]:
    """The dicts that hold what belongs to a module and its submodules."""
    for module in root.modules():
        own = vars(module)
        yield from (held for name in _HELD if isinstance(held := own.get(name), dict))
        yield from (held for name in _HOOKS if isinstance(held := own.get(name), dict) and held)


def _root(module: nn.Module, entries: Iterator[Entry] | Any) -> _Root:
    own = vars(module)
    expected = [(key, value) for holder, key, value in entries if holder is own]
    return _Root(
        weakref.ref(module), len(own), tuple(key for key, _ in expected), tuple(value for _, value in expected)
    )
