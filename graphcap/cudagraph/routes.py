"""Where a call goes: from its sizes and the kind of its batch to a mode and a rung of the ladder.

A *route* is what one plan is good for. Most calls have one; a uniform decode batch under FULL_AND_PIECEWISE has two,
and takes the first that there is a plan for. Everything here is decided once for each size and kind of batch: the
runner remembers the outcome.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from graphcap.config import Config, CUDAGraphMode
from graphcap.cudagraph.bindings import is_captured
from graphcap.cudagraph.ladder import Ladder, requests_ladder
from graphcap.cudagraph.ladders import Ladders, ladders_of
from graphcap.cudagraph.metadata import dims_of_step
from graphcap.cudagraph.padding import Padding
from graphcap.cudagraph.program import Capture, InputKind, Program
from graphcap.cudagraph.step import RUNTIME_MODES, Dispatch, GraphKey, step

NONE, PIECEWISE, FULL, AUTO = (
    CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL, CUDAGraphMode.AUTO,
)  # fmt: skip
TOKENS, REQS = "num_tokens", "num_reqs"


@dataclass(frozen=True, slots=True)
class Batch:
    """The kind of a batch, apart from the sizes of the arguments.

    Attributes:
        uniform_query_len: the tokens of each request where all have the same number.
        num_reqs: as said by a step; ``None`` where nobody said it.
        tags: those with plans of their own.
    """

    uniform_query_len: int | None = None
    num_reqs: int | None = None
    tags: tuple[tuple[str, Hashable], ...] = ()


@dataclass(frozen=True, slots=True)
class Route:
    """What one plan is good for.

    Attributes:
        mode: PIECEWISE or FULL.
        batch: the kind of batch, as far as the plan depends on it.
        sizes: per symbol of the key the size at which the plan is captured; ``None`` where it does not depend on it.
        rung: the symbols that may be padded for it, with the size they are padded to; empty for exact sizes.
        named: the padded size of each declared dim, by name.
        is_declared: whether it is on the ladder.
    """

    mode: CUDAGraphMode
    batch: Batch
    sizes: tuple[Any, ...]
    rung: Mapping[str, int] = field(hash=False)
    named: Mapping[str, int] = field(hash=False)
    is_declared: bool

    @property
    def key(self) -> Hashable:
        """By which plans are kept."""
        return self.mode, self.batch, self.sizes

    def computed(self, real: tuple[int, ...]) -> tuple[int, ...]:
        """The sizes that a batch of these is computed at: padded where the plan depends on them."""
        return tuple(size if at is None else at for size, at in zip(real, self.sizes, strict=True))


class Router:
    """Routes for the calls of one program.

    Attributes:
        symbols: what the sizes of a key are values of, in the order of the key.
        tokens: the symbol that counts tokens, ``None`` where there is none.
        reqs: the symbol that counts requests, ``None`` where there is none.
        names: per symbol what the user calls it.
        notes: what of the settings could not be used.
        rung_of: takes sizes, returns those of the rung that covers them, ``None`` where the ladder does not.
    """

    def __init__(self, program: Program, config: Config, padding: Padding) -> None:
        """Work out what does not change from call to call."""
        scalars = [(i, s) for i, s in enumerate(program.inputs) if s.kind is InputKind.SCALAR and s.in_key]
        followed = [(padding.told_by.get(index), spec) for index, spec in scalars]
        #: Per scalar of the key its symbol, and how it follows from that.
        self._told = tuple((size.symbol if size else spec.symbol or spec.name, size) for size, spec in followed)
        self.symbols = tuple(dict.fromkeys(symbol for symbol, _ in self._told))
        self._names = padding.declared
        by_name = {name: symbol for symbol, name in self._names.items()}
        self.tokens = by_name.get(TOKENS) or (self.symbols[0] if len(self.symbols) == 1 else None)
        self.reqs = by_name.get(REQS)
        self._program = program
        self._config = config
        self._padding = padding
        self.names = tuple(self._names.get(each, TOKENS if each == self.tokens else each) for each in self.symbols)
        padded = [name for name, symbol in zip(self.names, self.symbols, strict=True) if symbol in padding.names]
        found = ladders_of(self.names, padded, config)
        self.notes = found.notes
        self.rung_of = found.rung_of
        self._ladders = dict(zip(self.symbols, found.ladders, strict=True))
        self._decode_ladders: dict[int, Ladder] = {}
        # Where no argument carries the requests, inputs of the step may.
        self._counts_reqs = any(REQS in dims.values() for dims in dims_of_step(config.dynamic_arg_dims).values())
        kinds = {each.capture for each in program.steps}
        self._has_uniform = not kinds.isdisjoint({Capture.UNIFORM, Capture.UNIFORM_SINGLE})

    def captured(self, route: Route) -> tuple[int, ...]:
        """The steps that may be captured on a route."""
        full, length = route.mode is FULL, route.batch.uniform_query_len
        return tuple(n for n, each in enumerate(self._program.steps) if is_captured(each, full, length))

    def sizes_of(self, scalars: Any) -> tuple[int, ...]:
        """The size of each of :attr:`symbols`.

        Args:
            scalars: those of the key, of one call: one value or a tuple of them.
        """
        return tuple(self._real(scalars).values())

    def _real(self, scalars: Any) -> dict[str, int]:
        values = scalars if isinstance(scalars, tuple) else (scalars,)
        told = zip(self._told, values, strict=True)
        return {symbol: size.symbol_at(value) if size else value for (symbol, size), value in told}

    def routes(self, scalars: Any, said: step | None) -> tuple[Route, ...] | str:
        """The routes of a call, the better one first; or why there is none.

        Args:
            scalars: as for :meth:`sizes_of`.
            said: the step in force.
        """
        real = self._real(scalars)
        key = said.key if said is not None else None
        decision = said.dispatch if said is not None else None
        limit = said.max_mode if said is not None else None
        return self._routes(real, self._batch(real, key), limit, decision)

    def routes_of(self, key: GraphKey, max_mode: CUDAGraphMode | None) -> tuple[Route, ...] | str:
        """The routes of a batch that nobody has called with yet."""
        given = dict(key.sizes)
        real = {symbol: given.get(name, 0) for symbol, name in zip(self.symbols, self.names, strict=True)}
        if self.tokens is not None:
            real[self.tokens] = key.num_tokens
        if self.reqs is not None and key.num_reqs is not None:
            real[self.reqs] = key.num_reqs
        return self._routes(real, self._batch(real, key), max_mode, None)

    def dispatch(self, route: Route, key: GraphKey) -> Dispatch:
        """How a batch runs on a route; requests follow the tokens where the plan does not fix them."""
        sizes = dict(zip(self.symbols, route.sizes, strict=True))
        at = dict(zip(self.names, route.sizes, strict=True))
        others = tuple((name, size if at.get(name) is None else at[name]) for name, size in key.sizes)
        tokens = sizes.get(self.tokens or "") or key.num_tokens
        if self.tokens is None and others:
            tokens = math.prod(size for _, size in others)
        reqs = sizes.get(self.reqs or "") or route.named.get(REQS)
        length = key.uniform_query_len
        if reqs is None and length is not None and tokens % length == 0:
            reqs = tokens // length
        return Dispatch(route.mode, tokens, key.num_reqs if reqs is None else reqs, key, sizes=others)

    def ladder(self) -> list[GraphKey]:
        """The batches to capture beforehand: mixed ones first, then uniform decode, each the largest first.

        Where several dims have ladders that is their product; of more than ``max_plans`` rungs the smallest stay. A dim
        without one is not in the key: it has the size that the inputs happen to have.
        """
        mode, most = self._config.cudagraph_mode, self._config.max_num_reqs
        if mode is NONE:
            return []
        tokens, mixed = self._ladders.get(self.tokens or ""), mode.mixed_mode() is not NONE
        if tokens is None:
            return [self._key_at(sizes) for sizes in self._product(self._ladders) if mixed]
        others = {symbol: each for symbol, each in self._ladders.items() if symbol not in (self.tokens, self.reqs)}
        others = {symbol: each for symbol, each in others.items() if each is not None}
        assert self.tokens is not None
        rungs = self._product({self.tokens: tokens, **others})
        keys = [self._key_at(sizes, min(sizes[self.tokens], most or sizes[self.tokens])) for sizes in rungs if mixed]
        if mode.separate_routine() or self._has_uniform:
            rungs = self._product({self.tokens: self._decode_ladder(tokens, 1), **others})
            keys += [self._key_at(sizes, sizes[self.tokens], 1) for sizes in rungs]
        return keys

    def _product(self, ladders: Mapping[str, Ladder | None]) -> list[dict[str, int]]:
        """The rungs that ladders make together, by symbol, the largest first. One ladder alone is never cut short."""
        both = Ladders([*ladders], [*ladders.values()])
        rungs = both.rungs(both.num_rungs if len(ladders) == 1 else self._config.max_plans)
        limit = self._config.max_capture_size
        allowed = [rung for rung in rungs if limit is None or max(rung) <= limit]
        return [dict(zip(ladders, rung, strict=True)) for rung in allowed]

    def _key_at(self, sizes: Mapping[str, int], reqs: int | None = None, length: int | None = None) -> GraphKey:
        """The batch with these sizes, by symbol."""
        named = {name: sizes[symbol] for symbol, name in zip(self.symbols, self.names, strict=True) if symbol in sizes}
        further = {name: size for name, size in named.items() if name not in (TOKENS, REQS)}
        reqs = named.get(REQS) if reqs is None else reqs
        return GraphKey.of_sizes(further, sizes.get(self.tokens or ""), num_reqs=reqs, uniform_query_len=length)

    def short_of(self, key: GraphKey) -> GraphKey | None:
        """A batch that is padded to a rung of the ladder: a row, or a request, less than it; ``None`` where there is
        none. A call with it is one in which padding can prove itself, for each dim that may be padded."""
        symbols = dict(zip(self.names, self.symbols, strict=True))
        sizes = {
            name: size - 1 if (ladder := self._ladders.get(symbols.get(name, ""))) and size - 1 not in ladder else size
            for name, size in key.sizes
        }
        sizes = {name: max(size, 1) for name, size in sizes.items()}
        if self.tokens is None:
            fewer = GraphKey.of_sizes(sizes, num_reqs=key.num_reqs, tags=key.tags)
            return None if fewer == key else fewer
        length = key.uniform_query_len
        tokens, reqs = key.num_tokens - (length or 1), key.num_reqs
        if tokens <= 0:
            return None
        if reqs is not None:
            reqs = min(reqs if length is None else reqs - 1, tokens)
        further = {name: tokens if symbols.get(name) == self.tokens else size for name, size in sizes.items()}
        return GraphKey.of_sizes(further, tokens, num_reqs=reqs, uniform_query_len=length, tags=key.tags)

    def _decode_ladder(self, tokens: Ladder, query_len: int) -> Ladder:
        """Counted in requests of ``query_len`` tokens each."""
        if query_len not in self._decode_ladders:
            self._decode_ladders[query_len] = requests_ladder(tokens, query_len, self._config.max_num_reqs)
        return self._decode_ladders[query_len]

    def _batch(self, real: Mapping[str, int], key: GraphKey | None) -> Batch:
        if key is None:
            tokens, reqs = real.get(self.tokens or ""), real.get(self.reqs or "")
            # Every request brings at least one token: as many tokens as requests is one for each.
            return Batch(1 if tokens is not None and tokens == reqs else None)
        wanted = self._config.specialize_tags
        tags = tuple(pair for pair in key.tags if pair[0] in wanted)
        return Batch(key.uniform_query_len, key.num_reqs, tags)

    def _modes(self, batch: Batch, cap: CUDAGraphMode) -> list[CUDAGraphMode]:
        """The modes that a batch may run in, the better one first.

        A caller's veto turns FULL into PIECEWISE wherever the mode has PIECEWISE for some batch; a decode batch for
        which there is no FULL plan takes the PIECEWISE one where mixed batches have them anyway.
        """
        config, length = self._config.cudagraph_mode, batch.uniform_query_len
        mode = config.decode_mode() if length is not None else config.mixed_mode()
        if mode is AUTO:
            mode = FULL if all(is_captured(each, True, length) for each in self._program.steps) else PIECEWISE
        both = config is CUDAGraphMode.FULL_AND_PIECEWISE or (config is AUTO and self._has_uniform)
        vetoed = mode is FULL and cap is PIECEWISE and config is not CUDAGraphMode.FULL_DECODE_ONLY
        wanted = [mode, PIECEWISE] if mode is FULL and (both or vetoed) else [mode]
        return [each for each in wanted if NONE is not each and RUNTIME_MODES.index(each) <= RUNTIME_MODES.index(cap)]

    def _routes(
        self, real: Mapping[str, int], batch: Batch, limit: CUDAGraphMode | None, decision: Dispatch | None
    ) -> tuple[Route, ...] | str:
        decided = FULL if decision is None else decision.mode
        modes = self._modes(batch, min(limit or FULL, decided, key=RUNTIME_MODES.index))
        if not modes:
            if decided is NONE:
                return "dispatched to run without a graph"
            return "max_mode=NONE" if limit is NONE else f"cudagraph_mode={self._config.cudagraph_mode.name}"
        found = [self._route(mode, real, batch, decision) for mode in modes]
        routes = tuple(each for each in found if isinstance(each, Route))
        return routes or next(each for each in found if isinstance(each, str))

    def _route(
        self, mode: CUDAGraphMode, real: Mapping[str, int], batch: Batch, decision: Dispatch | None
    ) -> Route | str:
        full = mode is FULL
        length = batch.uniform_query_len if full else None
        matters = self._matters(full, length)
        limit = self._config.max_capture_size
        if limit is not None and any(real[s] > limit for s in matters if s not in self._padding.fixed):
            return f"above max_capture_size={limit}"
        rung = self._rung(real, matters, length, decision)
        if isinstance(rung, str):
            return rung
        declared = rung is not None
        sizes = {symbol: (rung or {}).get(symbol, real[symbol]) for symbol in self.symbols if symbol in matters}
        padded = {symbol: size for symbol, size in (rung or {}).items() if symbol in self._padding.names}
        padded |= {symbol: size for symbol, size in self._padding.fixed.items() if symbol in matters}
        sizes |= padded
        named = {name: sizes[symbol] for symbol, name in self._names.items() if symbol in sizes}
        said = batch.num_reqs if full and self._counts_reqs and self.reqs not in sizes else None
        if said is not None:
            tokens = sizes.get(self.tokens or "")
            said = tokens // length if length and tokens is not None else said
        named |= {} if said is None else {REQS: said}
        depends = Batch(length if self._has_uniform else None, said, batch.tags)
        return Route(mode, depends, tuple(sizes.get(each) for each in self.symbols), padded, named, declared)

    def _matters(self, full: bool, length: int | None) -> frozenset[str]:
        """The symbols that the captured steps depend on; all of them where the program does not say."""
        steps = self._program.steps
        if not any(each.symbols for each in steps):
            return frozenset(self.symbols)
        captured = (each.symbols for each in steps if is_captured(each, full, length))
        return frozenset(self.symbols).intersection(frozenset().union(*captured))

    def _rung(
        self, real: Mapping[str, int], matters: frozenset[str], length: int | None, decision: Dispatch | None
    ) -> dict[str, int] | str | None:
        """The declared sizes that serve these; ``None`` when one of them is not declared; or why the call runs live."""
        rung: dict[str, int] = {}
        for symbol in self.symbols:
            if symbol not in matters or symbol in self._padding.fixed:
                continue
            size, ladder, given = real[symbol], self._ladder(symbol, length), self._given(symbol, decision)
            found = given if given is not None and given >= size else ladder(size)
            if symbol not in self._padding.names and found != size:
                return None
            if isinstance(found, str):
                return found
            if found is None:
                return None
            rung[symbol] = found
        return rung or None

    def _ladder(self, symbol: str, length: int | None) -> Callable[[int], int | str | None]:
        """What looks a size up: the rung, ``None`` where it is no declared size, or why it runs live."""
        ladder, tokens = self._ladders[symbol], self._ladders.get(self.tokens or "")
        unit = 1
        if length is not None and tokens is not None and symbol in (self.tokens, self.reqs):
            ladder = self._decode_ladder(tokens, length)
            unit = length if symbol == self.tokens else 1

        def find(size: int) -> int | str | None:
            if ladder is None:
                return None
            found = ladder.rung_of(size // unit)
            if found is None and symbol in self._padding.names and size // unit > ladder.largest:
                return ladder.why_uncovered(size // unit)
            return None if found is None else found * unit

        return find

    def _given(self, symbol: str, decision: Dispatch | None) -> int | None:
        if decision is None:
            return None
        if symbol in (self.tokens, self.reqs):
            return decision.num_tokens if symbol == self.tokens else decision.num_reqs
        return dict(decision.sizes).get(self.names[self.symbols.index(symbol)])
