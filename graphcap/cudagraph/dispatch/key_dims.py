"""The dims of the key of a program: what each is called, where a call tells its size, and which sizes are declared."""

from __future__ import annotations

from typing import Any

from graphcap.config import Config
from graphcap.cudagraph.dispatch.key import Dispatch, GraphKey
from graphcap.cudagraph.dispatch.ladder import Ladder, requests_ladder
from graphcap.cudagraph.dispatch.ladders import ladders_of
from graphcap.cudagraph.padded.padding import Padding
from graphcap.cudagraph.program import InputKind, Program

TOKENS, REQS = "num_tokens", "num_reqs"


class KeyDims:
    """The dims of the key of one program.

    Attributes:
        symbols: one for each dim, in order. Several numbers of a call may follow one of them.
        names: per symbol what the user calls it.
        tokens: the symbol that counts tokens, ``None`` where there is none.
        reqs: the symbol that counts requests, ``None`` where there is none.
        ladders: per symbol its declared sizes, ``None`` where there are none.
        notes: what of the settings could not be used.
        rung_of: takes sizes, returns those of the rung that covers them, ``None`` where the ladder does not.
    """

    def __init__(self, program: Program, config: Config, padding: Padding) -> None:
        """Work out what does not change from call to call."""
        scalars = [(i, s) for i, s in enumerate(program.inputs) if s.kind is InputKind.SCALAR and s.in_key]
        followed = [(padding.told_by.get(index), spec) for index, spec in scalars]
        # Per number its symbol, and how it follows from that.
        self._told = tuple((size.symbol if size else spec.symbol or spec.name, size) for size, spec in followed)
        self.symbols = tuple(dict.fromkeys(symbol for symbol, _ in self._told))
        by_name = {name: symbol for symbol, name in padding.declared.items()}
        self.tokens = by_name.get(TOKENS) or (self.symbols[0] if len(self.symbols) == 1 else None)
        self.reqs = by_name.get(REQS)
        called = {each: TOKENS if each == self.tokens else each for each in self.symbols} | padding.declared
        self.names = tuple(called[each] for each in self.symbols)
        padded = [name for name, symbol in zip(self.names, self.symbols, strict=True) if symbol in padding.names]
        found = ladders_of(self.names, padded, config)
        self.notes, self.rung_of = found.notes, found.rung_of
        self.ladders = dict(zip(self.symbols, found.ladders, strict=True))
        self._max_num_reqs = config.max_num_reqs
        self._decode_ladders: dict[int, Ladder] = {}

    def sizes(self, scalars: Any) -> dict[str, int]:
        """The size of each symbol.

        Args:
            scalars: the numbers of the key, of one call: one value or a tuple of them.
        """
        values = scalars if isinstance(scalars, tuple) else (scalars,)
        told = zip(self._told, values, strict=True)
        return {symbol: size.symbol_at(value) if size else value for (symbol, size), value in told}

    def sizes_of(self, key: GraphKey) -> dict[str, int]:
        """The same for a batch that nobody has called with yet; 0 where its key does not say."""
        given = dict(key.sizes)
        real = {symbol: given.get(name, 0) for symbol, name in zip(self.symbols, self.names, strict=True)}
        if self.tokens is not None:
            real[self.tokens] = key.num_tokens
        if self.reqs is not None and key.num_reqs is not None:
            real[self.reqs] = key.num_reqs
        return real

    def scalars_of(self, key: GraphKey) -> list[int]:
        """The numbers of the key in a call with a batch."""
        real = self.sizes_of(key)
        return [size.at(real[symbol]) if size else real[symbol] for symbol, size in self._told]

    def decode_ladder(self, tokens: Ladder, query_len: int) -> Ladder:
        """Counted in requests of ``query_len`` tokens each."""
        if query_len not in self._decode_ladders:
            self._decode_ladders[query_len] = requests_ladder(tokens, query_len, self._max_num_reqs)
        return self._decode_ladders[query_len]

    def rung(self, symbol: str, size: int, length: int | None, is_padded: bool) -> int | str | None:
        """The declared size that serves a size; ``None`` where it is none, or why it runs live.

        Args:
            symbol: of the dim.
            size: of the call.
            length: the tokens of each request in a uniform batch that is counted in requests.
            is_padded: whether it may be padded.
        """
        ladder, tokens, unit = self.ladders[symbol], self.ladders.get(self.tokens or ""), 1
        if length is not None and tokens is not None and symbol in (self.tokens, self.reqs):
            ladder = self.decode_ladder(tokens, length)
            unit = length if symbol == self.tokens else 1
        if ladder is None:
            return None
        found = ladder.rung_of(size // unit)
        if found is None and is_padded and size // unit > ladder.largest:
            return ladder.why_uncovered(size // unit)
        return None if found is None else found * unit

    def decided(self, symbol: str, decision: Dispatch | None) -> int | None:
        """The size that a decision has for a dim."""
        if decision is None:
            return None
        if symbol in (self.tokens, self.reqs):
            return decision.num_tokens if symbol == self.tokens else decision.num_reqs
        return dict(decision.sizes).get(self.names[self.symbols.index(symbol)])
