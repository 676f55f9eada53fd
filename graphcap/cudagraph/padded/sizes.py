"""The sizes of inputs and outputs, told from those of the symbols that they follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from graphcap.cudagraph.program import DimSize, InputKind, InputSpec, Program, Size


def symbols_in(sizes: Sequence[DimSize]) -> set[str]:
    """The symbols that one of these sizes follows."""
    return {size.symbol for size in sizes if isinstance(size, Size)}


def sizes_at(sizes: Sequence[DimSize], symbols: Mapping[str, int]) -> torch.Size:
    """Sizes where symbols have these values."""
    return torch.Size(size.at(symbols[size.symbol]) if isinstance(size, Size) else int(size or 0) for size in sizes)


def known_sizes(sizes: Sequence[DimSize], symbols: Mapping[str, int]) -> tuple[int | None, ...]:
    """Per dim its size, where one of these symbols tells it."""
    return tuple(
        size.at(symbols[size.symbol]) if isinstance(size, Size) and size.symbol in symbols else None for size in sizes
    )


def strides_at(spec: InputSpec, symbols: Mapping[str, int]) -> Sequence[int]:
    """The strides of an input: as its spec says, else contiguous."""
    if spec.strides:
        return sizes_at(spec.strides, symbols)
    return torch.empty(sizes_at(spec.sizes, symbols), device="meta").stride()


def held_by(spec: InputSpec) -> DimSize:
    """What a scalar holds."""
    if spec.sizes:
        return spec.sizes[0]
    return Size(spec.symbol) if spec.symbol is not None and spec.symbol.isidentifier() else None


def scalars_that_tell(program: Program) -> dict[int, Size]:
    """The scalar inputs that tell the value of a symbol, each with how it follows from it."""
    scalars = [(index, spec) for index, spec in enumerate(program.inputs) if spec.kind is InputKind.SCALAR]
    return {index: size for index, spec in scalars if isinstance(size := held_by(spec), Size)}
