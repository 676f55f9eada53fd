"""A tensor in the leading corner of a larger one: how to cut it out, and how to fill what lies around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from graphcap.cudagraph.recording.arena import overlaps_itself, span

#: A number, "edge" (repeat the last row), or a function of the tensor and the size of its corner that fills the rest.
Fill = int | float | bool | str | Callable[[torch.Tensor, torch.Size], Any]


def declared_fill(fills: Mapping[str, Fill], path: str) -> Fill | None:
    """What ``pad`` says about an input, by its path or the path of a container that it is in."""
    paths = [each for each in fills if path == each or path.startswith(f"{each}.")]
    return fills[max(paths, key=len)] if paths else None


def corner(tensor: torch.Tensor, size: Sequence[int | None]) -> torch.Tensor:
    """A view of the leading ``size`` of a tensor; ``None`` keeps a dim whole. The tensor itself where that is all."""
    for dim, length in enumerate(size):
        if length is not None and tensor.shape[dim] != length:
            tensor = tensor.narrow(dim, 0, length)
    return tensor


def cut(value: torch.Tensor, size: Sequence[int | None]) -> torch.Tensor:
    """The leading ``size`` of a result, laid out as if it had been made in that size; ``None`` keeps a dim whole.

    It is the value itself, a view of it, or, where a dense value would leave gaps between its elements, a copy.
    """
    part = corner(value, size)
    if part is value:
        return value
    return part.clone() if is_dense(value) and not is_dense(part) else part


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill the memory from the first to the last, each in a place of its own."""
    return span(tensor) == tensor.numel() and not overlaps_itself(tensor)


def around(tensor: torch.Tensor, size: Sequence[int]) -> Iterator[tuple[int, torch.Tensor]]:
    """What lies outside of the corner, as views that do not overlap, each with the dim along which it follows."""
    for dim, length in enumerate(size):
        if tensor.shape[dim] != length:
            before_in_later_dims = corner(tensor, [*tensor.shape[: dim + 1], *size[dim + 1 :]])
            yield dim, before_in_later_dims.narrow(dim, length, tensor.shape[dim] - length)


def fill_around(tensor: torch.Tensor, size: torch.Size, fill: Fill) -> None:
    """Write the fill into everything outside of the corner.

    Raises:
        ValueError: "edge" without a row to repeat.
    """
    if callable(fill):
        fill(tensor, size)
        return
    for dim, rest in around(tensor, size):
        if not isinstance(fill, str):
            rest.fill_(fill)
        elif size[dim] == 0:
            raise ValueError(f'pad="edge": dim {dim} has no row to repeat')
        else:
            last = corner(tensor, [*tensor.shape[: dim + 1], *size[dim + 1 :]]).narrow(dim, size[dim] - 1, 1)
            rest.copy_(last.expand_as(rest))
