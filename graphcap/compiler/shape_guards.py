"""The conditions on sizes under which a compiled piece is right, kept beside it and checked wherever it is used again.

Inductor may specialise a piece ("8 * batch < 32767" for 32-bit indexing) and tells the shape environment so, which
makes Dynamo recompile at a size beyond. A piece that comes from the cache, or from a twin, must tell the same, or a
later size would silently run code that was never meant for it.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from graphcap.compiler import private


@dataclass(frozen=True)
class ShapeGuards:
    """Guard expressions over a piece's canonical symbols.

    Attributes:
        expressions: sympy expressions.
        symbols: the symbols of the piece that was compiled, in canonical order.
    """

    expressions: tuple[Any, ...] = ()
    symbols: tuple[Any, ...] = ()

    @classmethod
    def added_since(cls, before: Sequence[Any], fake_mode: Any, symbols: Sequence[Any]) -> ShapeGuards:
        """What a compile added to the shape environment, as far as it is about the piece's own symbols."""
        known = set(before)
        added = [e for e in private.shape_guards(fake_mode) if e not in known and e.free_symbols <= set(symbols)]
        return cls(tuple(dict.fromkeys(added)), tuple(symbols))

    def hold_for(self, symbols: Sequence[Any], fake_mode: Any) -> bool:
        """Whether the guards hold at this call's sizes, for a twin with ``symbols``; makes Dynamo watch them."""
        if not self.expressions:
            return True
        renamed = dict(zip(self.symbols, symbols, strict=True))
        return all(private.add_shape_guard(fake_mode, e.xreplace(renamed)) for e in self.expressions)

    def to_bytes(self) -> bytes:
        """For the cache."""
        return pickle.dumps((self.expressions, self.symbols))

    @classmethod
    def from_bytes(cls, payload: bytes) -> ShapeGuards:
        """The inverse of :meth:`to_bytes`; only for bytes that the store trusts."""
        return cls(*pickle.loads(payload))

    def __str__(self) -> str:
        return ", ".join(map(str, self.expressions))
