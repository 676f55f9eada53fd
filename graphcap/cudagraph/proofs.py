"""What was proven about padding, and for which calls that is good."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple

from graphcap.cudagraph.dispatch.key import GraphKey
from graphcap.cudagraph.dispatch.route import Route
from graphcap.cudagraph.dispatch.step import step
from graphcap.cudagraph.parts import Parts
from graphcap.cudagraph.program import InputKind


class Proof(NamedTuple):
    """What a proof is about: the symbols that are padded, and which numbers are 0 or 1."""

    symbols: frozenset[str]
    special: frozenset[tuple[str, Any]]


NOTHING_PADDED = Proof(frozenset(), frozenset())


class Proofs:
    """The proofs of one runner."""

    def __init__(self, parts: Parts) -> None:
        self._padding, self._dims = parts.padding, parts.router.dims
        inputs = enumerate(parts.program.inputs)
        self._scalars = {index: spec.name for index, spec in inputs if spec.kind is InputKind.SCALAR and spec.in_key}
        self._proven: dict[Hashable, list[Proof]] = {}  # per family of plans

    def needed(self, route: Route, args: tuple[Any, ...], said: step | None) -> Proof:
        """What must be proven for a call: of what it has to be padded in."""
        values = [(name, args[index]) for index, name in self._scalars.items()]
        return Proof(
            route.padded_in(self._padding.sizes(args) or {}), _special(values, None if said is None else said.key)
        )

    def needed_of(self, route: Route, key: GraphKey) -> Proof:
        """The same for a batch."""
        values = zip(self._scalars.values(), self._dims.scalars_of(key), strict=True)
        return Proof(route.padded_in(self._dims.sizes_of(key)), _special(values, key))

    def hold(self, route: Route, needed: Proof) -> bool:
        """Whether there are proofs for a call on a route. One in which something was 0 or 1 is good for such calls
        alone: it hides mixing (padded rows are rightly divided among one request; nothing times a mean is nothing)."""
        proofs = self._proven.get(self._family(route), ())
        return needed.symbols <= {s for proof in proofs if proof.special <= needed.special for s in proof.symbols}

    def note(self, route: Route, proof: Proof) -> None:
        """A call on a route has proven it."""
        self._proven.setdefault(self._family(route), []).append(proof)

    def _family(self, route: Route) -> Hashable:
        batch = route.batch  # the number of requests goes with the rung, what is proven does not
        named = zip(self._dims.symbols, route.sizes, strict=True)
        exact = tuple(size for symbol, size in named if symbol not in route.rung)
        return batch.uniform_query_len, batch.tags, frozenset(route.rung), exact


def _special(scalars: Iterable[tuple[str, Any]], key: GraphKey | None) -> frozenset[tuple[str, Any]]:
    """Which numbers of a call are 0 or 1, those of its batch included."""
    values = [*scalars, ("requests of the step", None if key is None else key.num_reqs)]
    return frozenset((name, value) for name, value in values if value is not None and value in (0, 1))
