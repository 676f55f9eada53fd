"""Where a call goes: from its sizes and the kind of its batch to a mode and a rung of the ladder.

A *route* is what one plan is good for. Most calls have one; a uniform decode batch under FULL_AND_PIECEWISE has two,
and takes the first that there is a plan for. Everything here is decided once for each size and kind of batch: the
runner remembers the outcome.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any

from graphcap.config import Config, CUDAGraphMode
from graphcap.cudagraph.dispatch.key import RUNTIME_MODES, Dispatch, GraphKey
from graphcap.cudagraph.dispatch.key_dims import REQS, KeyDims
from graphcap.cudagraph.dispatch.key_ladder import KeyLadder
from graphcap.cudagraph.dispatch.metadata import dims_of_step
from graphcap.cudagraph.dispatch.route import Batch, Route
from graphcap.cudagraph.dispatch.step import step
from graphcap.cudagraph.padded.padding import Padding
from graphcap.cudagraph.program import Capture, Program
from graphcap.cudagraph.recording.bindings import is_captured

NONE, PIECEWISE, FULL, AUTO = (
    CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL, CUDAGraphMode.AUTO,
)  # fmt: skip


class Router:
    """Routes for the calls of one program.

    Attributes:
        dims: those of its key.
        ladder: the batches to capture beforehand.
    """

    def __init__(self, program: Program, config: Config, padding: Padding) -> None:
        """Work out what does not change from call to call."""
        self._program, self._config, self._padding = program, config, padding
        kinds = {each.capture for each in program.steps}
        self._has_uniform = not kinds.isdisjoint({Capture.UNIFORM, Capture.UNIFORM_SINGLE})
        # Where no argument carries the requests, inputs of the step may.
        self._counts_reqs = any(REQS in dims.values() for dims in dims_of_step(config.dynamic_arg_dims).values())
        self.dims = KeyDims(program, config, padding)
        self.ladder = KeyLadder(self.dims, config, self._has_uniform, self._decode_serves_mixed())

    def captured(self, route: Route) -> tuple[int, ...]:
        """The steps that may be captured on a route."""
        full, length = route.mode is FULL, route.batch.uniform_query_len
        return tuple(n for n, each in enumerate(self._program.steps) if is_captured(each, full, length))

    def weight(self, route: Route) -> tuple[Hashable, int]:
        """What tells how much a plan takes: its kind, and how many rows it has."""
        sizes = dict(zip(self.dims.symbols, route.sizes, strict=True))
        tokens = sizes.get(self.dims.tokens or "")
        rows = math.prod(size for size in route.sizes if size is not None) if tokens is None else tokens
        return (route.mode, route.batch.uniform_query_len), rows

    def routes(self, scalars: Any, said: step | None) -> tuple[Route, ...] | str:
        """The routes of a call, the better one first; or why there is none.

        Args:
            scalars: the numbers of the key: one value or a tuple of them.
            said: the step in force.
        """
        real = self.dims.sizes(scalars)
        key = said.key if said is not None else None
        decision = said.dispatch if said is not None else None
        limit = said.max_mode if said is not None else None
        return self._routes(real, self._batch(real, key), limit, decision)

    def routes_of(self, key: GraphKey, max_mode: CUDAGraphMode | None) -> tuple[Route, ...] | str:
        """The routes of a batch that nobody has called with yet."""
        real = self.dims.sizes_of(key)
        return self._routes(real, self._batch(real, key), max_mode, None)

    def dispatch(self, route: Route, key: GraphKey) -> Dispatch:
        """How a batch runs on a route; requests follow the tokens where the plan does not fix them."""
        sizes = dict(zip(self.dims.symbols, route.sizes, strict=True))
        at = dict(zip(self.dims.names, route.sizes, strict=True))
        others = tuple((name, size if at.get(name) is None else at[name]) for name, size in key.sizes)
        tokens = sizes.get(self.dims.tokens or "") or key.num_tokens
        if self.dims.tokens is None and others:
            tokens = math.prod(size for _, size in others)
        reqs = sizes.get(self.dims.reqs or "") or route.named.get(REQS)
        length = key.uniform_query_len
        if reqs is None and length is not None and tokens % length == 0:
            reqs = tokens // length
        return Dispatch(route.mode, tokens, key.num_reqs if reqs is None else reqs, key, sizes=others)

    def _batch(self, real: Mapping[str, int], key: GraphKey | None) -> Batch:
        if key is None:
            tokens, reqs = real.get(self.dims.tokens or ""), real.get(self.dims.reqs or "")
            # Every request brings at least one token: as many tokens as requests is one for each.
            return Batch(1 if tokens is not None and tokens == reqs else None)
        wanted = self._config.specialize_tags
        tags = tuple(pair for pair in key.tags if pair[0] in wanted)
        return Batch(key.uniform_query_len, key.num_reqs, tags)

    def _decode_serves_mixed(self) -> bool:
        """Whether a plan of a uniform batch is good for a mixed one of its sizes as well, and may be padded in more:
        requests that have no ladder of their own are padded where they follow the tokens."""
        reqs = self.dims.reqs
        if self._has_uniform or reqs not in self._padding.names or self.dims.ladders[reqs] is not None:
            return False
        return FULL in self._modes(Batch(1), FULL) and FULL in self._modes(Batch(), FULL)

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
        limit, asked = self._config.max_capture_size, self._asked(real, decision)
        if limit is not None and any(asked[s] > limit for s in matters if s not in self._padding.fixed):
            return f"above max_capture_size={limit}"
        beyond = [bound for symbol, bound in self._program.bounds.items() if asked.get(symbol, 0) > bound]
        if beyond:
            return f"above {beyond[0]} rows the pieces run as they are, uncompiled"
        rung = self._rung(real, matters, length, decision)
        if isinstance(rung, str):
            return rung
        declared = bool(rung) and all(self._is_declared(symbol, size, length) for symbol, size in rung.items())
        sizes = {symbol: rung.get(symbol) or real[symbol] for symbol in self.dims.symbols if symbol in matters}
        padded = {symbol: size for symbol, size in rung.items() if size is not None and symbol in self._padding.names}
        padded |= {symbol: size for symbol, size in self._padding.fixed.items() if symbol in matters}
        sizes |= padded
        named = {name: sizes[symbol] for symbol, name in self._padding.declared.items() if symbol in sizes}
        said = batch.num_reqs if full and self._counts_reqs and self.dims.reqs not in sizes else None
        if said is not None:
            tokens = sizes.get(self.dims.tokens or "")
            said = tokens // length if length and tokens is not None else said
        named |= {} if said is None else {REQS: said}
        depends = Batch(length if self._has_uniform else None, said, batch.tags)
        return Route(mode, depends, tuple(sizes.get(each) for each in self.dims.symbols), padded, named, declared)

    def _asked(self, real: Mapping[str, int], decision: Dispatch | None) -> Mapping[str, int]:
        """The sizes of a call, or those that it is to be padded to by a decision, which may be anybody's."""
        if decision is None:
            return real
        decided = {symbol: self.dims.decided(symbol, decision) or 0 for symbol in self._padding.names}
        return {symbol: max(size, decided.get(symbol, 0)) for symbol, size in real.items()}

    def _is_declared(self, symbol: str, size: int | None, length: int | None) -> bool:
        """Whether a size is one of a ladder; that of a decision need not be."""
        is_padded = symbol in self._padding.names
        return size is not None and self.dims.rung(symbol, size, length, is_padded) == size

    def _matters(self, full: bool, length: int | None) -> frozenset[str]:
        """The symbols that the captured steps depend on; all of them where the program does not say."""
        steps = self._program.steps
        if not any(each.symbols for each in steps):
            return frozenset(self.dims.symbols)
        captured = (each.symbols for each in steps if is_captured(each, full, length))
        return frozenset(self.dims.symbols).intersection(frozenset().union(*captured))

    def _rung(
        self, real: Mapping[str, int], matters: frozenset[str], length: int | None, decision: Dispatch | None
    ) -> dict[str, int | None] | str:
        """Per size the declared one that serves it, ``None`` for one that has no ladder and stays as it is; empty where
        a size is not declared on its ladder; or why the call runs live."""
        rung: dict[str, int | None] = {}
        for symbol in self.dims.symbols:
            if symbol not in matters or symbol in self._padding.fixed:
                continue
            size, given, is_padded = real[symbol], self.dims.decided(symbol, decision), symbol in self._padding.names
            found = given if given is not None and given >= size else self.dims.rung(symbol, size, length, is_padded)
            if not is_padded:
                rung[symbol] = size if found == size else None
            elif isinstance(found, str):
                return found
            elif found is None and self.dims.ladders[symbol] is not None:
                return {}
            else:
                rung[symbol] = found
        return rung
