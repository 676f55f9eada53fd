"""Padding: not yet."""

from __future__ import annotations

from typing import Any

import torch

from graphcap.config import Config
from graphcap.cudagraph.program import Program, Size


class Padding:
    """Which symbols are padded."""

    def __init__(self, program: Program, config: Config) -> None:
        self.symbols: frozenset[str] = frozenset()
        self.fixed: dict[str, int] = {}
        self.names: dict[str, str] = {}
        for spec in program.inputs:
            for dim, name in spec.dim_names.items():
                size = spec.sizes[dim] if dim < len(spec.sizes) else None
                if isinstance(size, Size) and (size.scale, size.offset) == (1, 0):
                    self.names[size.symbol] = name


def fill_around(buffer: torch.Tensor, real: torch.Size, fill: Any) -> None:
    """Fill what lies outside of the first ``real`` elements of each dim."""
    for dim, size in enumerate(real):
        if size < buffer.shape[dim]:
            buffer.narrow(dim, size, buffer.shape[dim] - size).fill_(fill)
