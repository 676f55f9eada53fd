"""``guards="full"``: guards on state are evaluated once, and again when somebody has written to what they look at.

Python 3.12 and later tell of writes to dicts. Where guards hold, and all that some of them see lies in dicts, classes
and layouts (``guard_proof.py``), these hold until that changes: a call asks for it in one go, and evaluates the others.
A change means that all are evaluated, and if they hold a new proof begins.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from graphcap import native
from graphcap.compiler.frontend.guard_proof import proof_of
from graphcap.compiler.frontend.guard_tree import NO_ALIAS, Node
from graphcap.compiler.frontend.guards import SomeGuards
from graphcap.compiler.frontend.seal import Known, StaticInput
from graphcap.compiler.frontend.statics import FEW_CALLS, MAX_CHANGES


class WatchedState:
    """The state under one graph.

    Attributes:
        others: the guards that are evaluated on every call.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        names: Iterable[str],
        f_globals: dict[str, Any],
        proved: set[str],
        others: SomeGuards,
        statics: Sequence[StaticInput],
        num_arguments: int,
    ) -> None:
        """Know nothing yet.

        Args:
            nodes: the places that guards look at.
            names: of the modules that the frame begins with, as it has them.
            f_globals: its globals.
            proved: the places whose guards are not among ``others``, arguments aside.
            others: the other guards.
            statics: the inputs of the graph that are proved instead of fetched.
            num_arguments: how many it has in all.
        """
        self.others = others
        self._nodes = nodes
        self._names = tuple(names)
        self._globals = f_globals
        self._proved = proved
        self._statics = tuple(statics)
        self._num_arguments = num_arguments
        self._known: Known | None = None
        self._num_served = 0
        self._num_changes = 0

    def known(self, f_locals: dict[str, Any], ids: Sequence[int], *roots: object) -> Known | None:
        """What is known where all guards hold but those on arguments; ``None`` where they may not.

        Args:
            f_locals: the variables that the frame begins with.
            ids: of the tensors that must not be among those of the modules.
            roots: the modules, as the frame finds them.
        """
        known = self._known
        if known is None or not known.holds(*roots) or not known.ids.isdisjoint(ids) or not self.others(f_locals):
            return None
        self._num_served += 1
        return known

    def learn(self, *roots: nn.Module) -> bool:
        """All guards have held just now, in a call from plain Python. Returns whether the state is known from here on.

        Args: as above.
        """
        if self._known is not None and self._known.holds(*roots):
            return True
        self._known = None
        if self._num_changes >= MAX_CHANGES or native.status() != "extension":
            return False
        self._num_changes = self._num_changes + 1 if self._num_served < FEW_CALLS else 0
        self._num_served = 0
        self._known = self._prove(dict(zip(self._names, roots, strict=True)))
        return self._known is not None

    def _prove(self, roots: Mapping[str, nn.Module]) -> Known | None:
        proof = proof_of(self._nodes, roots, self._globals)
        values: list[Any] = [None] * self._num_arguments
        try:
            for static in self._statics:
                values[static.position] = proof.walk_to(proof.roots[static.root], static.steps)
        except LookupError:
            return None
        holds = proof.check() if self._proved <= proof.sources else None
        if holds is None:
            self._num_changes = MAX_CHANGES  # it will not be another time either
            return None
        return Known(holds, values, frozenset(proof.tensors))


def left_out(
    nodes: Sequence[Node], roots: Mapping[str, nn.Module], f_globals: dict[str, Any]
) -> tuple[set[str], set[str]] | None:
    """The places whose guards need not be evaluated where the state is known and arguments have a known layout: those
    in modules and globals, and those of arguments. ``None`` where there is nothing to win, or where guards see more of
    arguments.

    Args: as for :func:`~graphcap.compiler.frontend.guard_proof.proof_of`.
    """
    arguments = [node for node in nodes if not node.is_state and node.above]
    if not all(node.leads_to_step() or node.is_of_argument() for node in arguments):
        return None
    proved = proof_of(nodes, roots, f_globals).sources
    # That no two tensors are the same object is known for arguments and what modules hold, and not for other tensors.
    deep = any(node.has(NO_ALIAS) for node in nodes if node.is_state and node.source not in proved)
    known = {node.source for node in arguments if not (deep and node.has(NO_ALIAS))}
    return (proved, known) if proved else None
