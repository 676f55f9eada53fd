"""The batches that are captured beforehand, as keys: what the ladders of all dims make together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from graphcap.config import Config, CUDAGraphMode
from graphcap.cudagraph.dispatch.key import GraphKey
from graphcap.cudagraph.dispatch.key_dims import REQS, TOKENS, KeyDims
from graphcap.cudagraph.dispatch.ladder import Ladder
from graphcap.cudagraph.dispatch.ladders import Ladders

NONE = CUDAGraphMode.NONE


class KeyLadder:
    """The rungs of all dims of one program."""

    def __init__(self, dims: KeyDims, config: Config, has_uniform: bool, decode_serves_mixed: bool) -> None:
        """Look at the ladders.

        Args:
            dims: whose.
            config: how they are captured.
            has_uniform: whether some steps are captured in uniform batches only.
            decode_serves_mixed: whether the plan of a uniform batch serves a mixed one of the same sizes.
        """
        self._dims, self._config = dims, config
        self._has_decode = config.cudagraph_mode.separate_routine() or has_uniform or decode_serves_mixed
        self._decode_serves_mixed = decode_serves_mixed

    def batches(self) -> list[GraphKey]:
        """The batches to capture: mixed ones first, then uniform decode, each the largest first.

        Where several dims have ladders that is their product; of more than ``max_plans`` rungs the smallest stay. A dim
        without one is not in the key: it has the size that the inputs happen to have.
        """
        mode, most = self._config.cudagraph_mode, self._config.max_num_reqs
        if mode is NONE:
            return []
        by, ladders, mixed = self._dims.tokens, self._dims.ladders, mode.mixed_mode() is not NONE
        tokens = None if by is None else ladders.get(by)
        if by is None or tokens is None:
            return [self._key(sizes) for sizes in self._product(ladders) if mixed]
        others = {symbol: each for symbol, each in ladders.items() if each and symbol not in (by, self._dims.reqs)}
        rungs = self._product({by: tokens, **others})
        keys = [self._key(sizes, min(sizes[by], most or sizes[by])) for sizes in rungs if mixed]
        if not self._has_decode:
            return keys
        rungs = self._product({by: self._dims.decode_ladder(tokens, 1), **others})
        decode = [self._key(sizes, sizes[by], 1) for sizes in rungs]
        if self._decode_serves_mixed:
            served = {replace(key, uniform_query_len=None) for key in decode}
            keys = [key for key in keys if key not in served]
        return keys + decode

    def short_of(self, key: GraphKey) -> GraphKey | None:
        """A batch that is padded to this rung: a row, or a request, less than it has; ``None`` where no batch is. In a
        call with it padding can prove itself, for each dim that may be padded."""
        symbols = dict(zip(self._dims.names, self._dims.symbols, strict=True))
        ladders = {name: self._dims.ladders[symbol] for name, symbol in symbols.items()}
        sizes = {name: _one_less(ladders.get(name), size) for name, size in key.sizes}
        if self._dims.tokens is None:
            fewer = GraphKey.of_sizes(sizes, num_reqs=key.num_reqs, tags=key.tags)
            return None if fewer == key else fewer
        length, reqs, of_tokens = key.uniform_query_len, key.num_reqs, self._dims.ladders[self._dims.tokens]
        if length is not None and of_tokens is not None:
            of_tokens = self._dims.decode_ladder(of_tokens, length)
        tokens = _one_less(of_tokens, key.num_tokens // (length or 1)) * (length or 1)
        if reqs is not None:
            reqs = min(_one_less(ladders.get(REQS), reqs), tokens) if length is None else tokens // length
        sizes = {name: tokens if symbols.get(name) == self._dims.tokens else size for name, size in sizes.items()}
        fewer = GraphKey.of_sizes(sizes, tokens, num_reqs=reqs, uniform_query_len=length, tags=key.tags)
        return None if fewer == key else fewer

    def _product(self, ladders: Mapping[str, Ladder | None]) -> list[dict[str, int]]:
        """The rungs that ladders make together, by symbol, the largest first. One ladder alone is never cut short."""
        both = Ladders([*ladders], [*ladders.values()])
        rungs = both.rungs(both.num_rungs if len(ladders) == 1 else self._config.max_plans)
        limit = self._config.max_capture_size
        allowed = [rung for rung in rungs if limit is None or max(rung) <= limit]
        return [dict(zip(ladders, rung, strict=True)) for rung in allowed]

    def _key(self, sizes: Mapping[str, int], reqs: int | None = None, length: int | None = None) -> GraphKey:
        """The batch with these sizes, by symbol."""
        names = dict(zip(self._dims.symbols, self._dims.names, strict=True))
        named = {names[symbol]: size for symbol, size in sizes.items()}
        further = {name: size for name, size in named.items() if name not in (TOKENS, REQS)}
        reqs = named.get(REQS) if reqs is None else reqs
        return GraphKey.of_sizes(further, sizes.get(self._dims.tokens or ""), num_reqs=reqs, uniform_query_len=length)


def _one_less(ladder: Ladder | None, size: int) -> int:
    """A size that is padded to this one; the size itself where the one below has a rung of its own."""
    return size if ladder is None or size <= 1 or size - 1 in ladder else size - 1
