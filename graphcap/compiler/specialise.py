"""Static sizes for chosen batch sizes: ``compile_sizes=[1, 8]`` compiles each piece once more for exactly those.

With the sizes known Inductor can unroll, drop masks and choose other kernels. Only a graph with a single size in its
key can be specialised; a size that is not listed takes the symbolic pieces.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from graphcap.compiler import nodes, private
from graphcap.compiler.split import Piece
from graphcap.compiler.symbols import SizeSymbols, symbols_in

log = logging.getLogger(__name__)


def specialisable_symbol(sizes: SizeSymbols) -> Any:
    """The one symbol that decides all sizes of the key; ``None`` where there is none, or more than one."""
    return next(iter(sizes.key)) if len(sizes.key) == 1 else None


def example_arguments(piece: Piece, symbol: Any, size: int) -> list[Any] | None:
    """Real tensors and ints for a piece's inputs at ``symbol == size``; ``None`` for a piece that the size leaves open.

    The tensors are uninitialised: only their sizes, strides, dtypes and devices matter.
    """
    values = [nodes.value_of(node) for node in piece.inputs]
    if symbols_in(values) != [symbol]:
        return None
    return [_example(value, {symbol: size}) for value in values]


def _example(value: Any, known: Mapping[Any, int]) -> Any:
    def at(size: Any) -> int:
        expression = private.symbol_expression(size)
        return int(size) if expression is None else int(expression.xreplace(dict(known)))

    if not isinstance(value, torch.Tensor):
        return at(value)
    strides = [at(stride) for stride in value.stride()]
    return torch.empty_strided([at(s) for s in value.shape], strides, dtype=value.dtype, device=value.device)


def by_size(
    general: Callable[..., Any], special: Mapping[int, Callable[..., Any]], position: int
) -> Callable[..., Any]:
    """A callable that takes the specialised code where the argument at ``position`` names a specialised size."""
    if not special:
        return general
    table = dict(special)

    def dispatch(*args: Any) -> Any:
        return table.get(args[position], general)(*args)

    return dispatch


def position_of(symbol: Any, placeholders: Sequence[Any]) -> int:
    """The index of the placeholder that carries ``symbol``."""
    return next(i for i, n in enumerate(placeholders) if private.symbol_expression(nodes.value_of(n)) == symbol)
