"""In Python: where tensors lie, and copies to where they should."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch


class AddressCheck:
    """Whether tensors still begin where they began.

    Called with one tuple or list, it is true exactly when every ``indices[k]`` is the index of a tensor in it whose
    ``data_ptr()`` equals ``addresses[k]``; that of an empty, a meta and a fake tensor is 0. What is no tensor and what
    refuses to tell an address (a sparse tensor, one inside of functorch's transforms) is a false, never an exception.
    So is a copy-on-write tensor that shares its memory: it moves when it is written, while a graph would write to what
    it shares. (The extension says false for every copy-on-write tensor and leaves it as it is; this class, like
    ``data_ptr()``, makes its copy.)

    Refers to no tensor.

    Raises:
        ValueError: when the two sequences differ in length, or for a negative index.
        TypeError: for what is no integer; when called, for what is no tuple or list.
    """

    __slots__ = ("_addresses", "_indices")

    def __init__(self, indices: Sequence[int], addresses: Sequence[int]) -> None:
        self._indices = _indices(indices)
        self._addresses = [operator.index(address) for address in addresses]
        if len(self._indices) != len(self._addresses):
            raise ValueError(f"{len(self._indices)} indices, but {len(self._addresses)} addresses")

    def __call__(self, args: tuple[Any, ...] | list[Any], /) -> bool:
        if not isinstance(args, (tuple, list)):
            raise TypeError("AddressCheck takes one argument, a tuple or a list")
        try:
            return list(map(torch.Tensor.data_ptr, map(args.__getitem__, self._indices))) == self._addresses
        except Exception:
            return False


class ApartCheck:
    """Whether tensors lie in other storages than some.

    Called with one tuple or list, it is true exactly when every ``indices[k]`` is the index of a tensor in it whose
    storage begins at none of the ``addresses``. What is no tensor or has no storage is a false.

    Raises:
        ValueError: for a negative index.
        TypeError: for what is no integer; when called, for what is no tuple or list.
    """

    __slots__ = ("_addresses", "_indices")

    def __init__(self, indices: Sequence[int], addresses: Sequence[int]) -> None:
        self._indices = _indices(indices)
        self._addresses = frozenset(operator.index(address) for address in addresses)

    def __call__(self, args: tuple[Any, ...] | list[Any], /) -> bool:
        if not isinstance(args, (tuple, list)):
            raise TypeError("ApartCheck takes one argument, a tuple or a list")
        try:
            return self._addresses.isdisjoint([args[index].untyped_storage().data_ptr() for index in self._indices])
        except Exception:
            return False


class GroupedCopy:
    """Copies arguments into tensors of one dtype, which nobody else knows: autograd does not see it.

    Called with one tuple or list, it copies what has the index ``indices[k]`` in it into ``targets[k]``, which has the
    same size. There is at least one.

    Raises:
        ValueError: when the two sequences differ in length, or for a negative index.
        TypeError: for targets that are no tensors; when called, for what is no tuple or list, or has no tensor there.
        RuntimeError: when called, from torch: sizes that do not fit.
    """

    __slots__ = ("_indices", "_targets")

    def __init__(self, targets: Sequence[torch.Tensor], indices: Sequence[int]) -> None:
        self._targets, self._indices = list(targets), _indices(indices)
        for number, target in enumerate(self._targets):
            if not isinstance(target, torch.Tensor):
                raise TypeError(f"target {number}: expected a tensor, got {target!r}")
        if len(self._targets) != len(self._indices):
            raise ValueError(f"{len(self._targets)} targets, but {len(self._indices)} indices")

    def __call__(self, args: tuple[Any, ...] | list[Any], /) -> None:
        if not isinstance(args, (tuple, list)):
            raise TypeError("GroupedCopy takes one argument, a tuple or a list")
        with torch.no_grad():
            torch._foreach_copy_(self._targets, [_tensor(args, index) for index in self._indices])


def _tensor(args: Sequence[Any], index: int) -> torch.Tensor:
    found = args[index] if index < len(args) else None
    if isinstance(found, torch.Tensor):
        return found
    raise TypeError(f"argument {index}: expected a tensor, got {found!r}")


def _indices(given: Sequence[int]) -> list[int]:
    indices = [operator.index(index) for index in given]
    if indices and min(indices) < 0:
        raise ValueError(f"an index must not be negative, got {min(indices)}")
    return indices
