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

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from graphcap import native
from graphcap.compiler.frontend import plain_call
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


@dataclass(frozen=True, slots=True)
class Known:
    """A seal: what has to be unchanged, and the graph's arguments as long as it is.

    Attributes:
        holds: takes the own dicts of the modules where everything begins.
        values: the arguments, ``None`` for those that are no static inputs.
        ids: of the static inputs.
        spare: lists like ``values`` that no call uses now. A call takes one and puts it back as it was: hundreds of
            references are not counted up and down for each then.
    """

    holds: Callable[..., bool]
    values: list[Any]
    ids: frozenset[int]
    spare: list[list[Any]] = field(default_factory=list)


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
        self._known: Known | None = None
        self._remaining = EVERY - 1
        self._plans = -1
        self._num_served = 0
        self._num_changes = 0

    @property
    def is_closed(self) -> bool:
        """Whether calls go by that evaluate only the guards on arguments."""
        return self._known is not None

    def __call__(self, ids: Sequence[int], *roots: dict[str, Any]) -> list[Any] | None:
        """A fresh argument list with the static inputs filled in; ``None`` where the seal does not hold.

        Args: as for :meth:`known`.
        """
        known = self.known(ids, *roots)
        return None if known is None else known.values.copy()

    def known(self, ids: Sequence[int], *roots: dict[str, Any]) -> Known | None:
        """What the seal knows; ``None`` where it does not hold.

        Args:
            ids: of the tensors that must not be among the static inputs.
            roots: the own dicts of the modules, as the frame finds them.
        """
        known = self._known
        if known is None or self._plans != plans_made.count or self._remaining <= 0:
            return None
        if not known.holds(*roots) or not known.ids.isdisjoint(ids):
            return None
        self._remaining -= 1
        return known

    def renew(self, f_locals: dict[str, Any], ids: Sequence[int], *roots: nn.Module) -> list[Any] | None:
        """The same where the seal does not hold and the guards on arguments do; ``None`` where all guards decide.

        Args:
            f_locals: the variables that the frame begins with.
            ids: as above.
            roots: the modules themselves.

        Raises:
            GuardError: a guard on what no seal covers fails.
        """
        if self._num_changes >= MAX_CHANGES or native.status() != "extension":
            return None
        if not all(isinstance(root, nn.Module) for root in roots):
            return None
        self._num_served += EVERY - 1 - self._remaining
        self._remaining = EVERY - 1
        known, plans = self._known, plans_made.count
        holds = known is not None and known.holds(*map(vars, roots))
        if not self._guards(f_locals):
            self._known = None
            if holds and known is not None and known.ids.isdisjoint(ids):
                self._raise(f_locals)
            return None
        if known is None or not holds:
            known = self._known = self._look(roots)
        self._plans = plans
        return None if known is None else known.values.copy()

    def _look(self, roots: Sequence[nn.Module]) -> Known | None:
        """Everything as it is now, in a call from plain Python; ``None`` where dict entries alone do not lead to an
        input."""
        self._num_changes = self._num_changes + 1 if self._num_served < FEW_CALLS else 0
        self._num_served = 0
        entries: dict[tuple[int, Any], Entry] = {}
        values: list[Any] = [None] * self._num_arguments
        for holder, names in (each for root in roots for each in _dicts_of(root)):
            entries |= {(id(holder), name): (holder, name, holder[name]) for name in names}
        sized = list({id(holder): holder for root in roots for holder, _ in _dicts_of(root)}.values())
        try:
            for static in self._statics:
                for entry in walk(roots[static.root], static.steps):
                    entries[id(entry[0]), entry[1]] = entry
                    values[static.position] = entry[2]
        except LookupError:
            return None
        # The own dicts of the roots are given at each call, as what owns this seal may be found in one of them.
        numbers = {id(vars(root)): number for number, root in enumerate(roots)}
        holds = native.identity_check(
            [
                *((numbers.get(id(holder), holder), name, value) for holder, name, value in entries.values()),
                *plain_call.plain_entries(),
            ],
            [(numbers[id(holder)], holder) if id(holder) in numbers else holder for holder in sized],
        )
        return Known(holds, values, frozenset(id(values[static.position]) for static in self._statics))

    def _raise(self, f_locals: dict[str, Any]) -> None:
        if guard := self._guards.failing(f_locals):
            raise GuardError(
                f"{self._name}: the compiled code relies on something that has changed since it was traced: {guard}. "
                f"With guards='sealed' this is looked at when a plan is made and at every {EVERY}th call, so calls "
                "before this one may have run without the change. The next call is traced anew. If it is meant to "
                "change while the model is in use, compile with guards='full'."
            )


def _dicts_of(root: nn.Module) -> Iterator[tuple[dict[Any, Any], Iterable[Any]]]:
    """The dicts of a module and its submodules, each with the keys that matter in it."""
    for module in root.modules():
        own = vars(module)
        yield own, [name for name in _STATE if name in own]
        held = [own.get(name) for name in _HELD] + [own.get(name) or None for name in _HOOKS]
        yield from ((each, each) for each in held if isinstance(each, dict))
