"""In Python: whether objects are what they were when they were looked at."""

from __future__ import annotations

import operator
import sys
from collections.abc import Hashable, Iterable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from graphcap.native.objects import Entry

_MISSING = object()
_OF_A_FUNCTION = ("__code__", "__defaults__", "__kwdefaults__")


def tells_of_writes() -> bool:
    """Whether this Python tells of writes to dicts, so that the extension can have such a check."""
    return sys.version_info >= (3, 12)


class StateCheck:
    """Whether nothing has been written to dicts, and objects and tensors have kept their form.

    A call takes the objects ``roots``. It is true exactly when they are the very same ones and, since this was made,

    - no ``dict[key]`` of an entry ``(dict, key, object)`` has been anything but that object;
    - no dict in ``sized`` has got or lost a key;
    - every object, and every tensor, has the class and the ``__dict__`` that it had;
    - every function among them has the ``__code__``, ``__defaults__`` and ``__kwdefaults__`` that it had;
    - every tensor has the dtype, device, sizes, strides, ``requires_grad`` and dispatch keys that it had.

    Once a dict has been written to in such a way it is false for ever. The extension is told of writes and keeps
    nothing alive, as the end of a dict counts for one. This here sees what writes have left, keeps everything alive,
    and takes as long as a look at all of it: it is the contract, and for tests.

    Raises:
        TypeError: for what is no such entry, dict or tensor.
        ValueError: nobody tells of writes to one of the dicts (the extension before Python 3.12, for example).
    """

    __slots__ = ("_entries", "_forms", "_is_broken", "_layouts", "_roots", "_sized")

    def __init__(
        self,
        roots: Iterable[object],
        entries: Iterable[Entry],
        sized: Iterable[dict[Any, Any]],
        objects: Iterable[object],
        tensors: Iterable[Tensor],
    ) -> None:
        self._roots = tuple(roots)
        self._entries = [_entry(each) for each in entries]
        self._sized = [(each, _keys(each)) for each in sized]
        tensors = list(tensors)
        self._layouts = [(each, _layout(each)) for each in tensors]
        self._forms = [(each, _form(each)) for each in (*objects, *tensors)]
        self._is_broken = False

    def __call__(self, *roots: object) -> bool:
        self._is_broken = self._is_broken or not (
            all(holder.get(key, _MISSING) is held for holder, key, held in self._entries)
            and all(_keys(holder) == keys for holder, keys in self._sized)
        )
        return (
            not self._is_broken
            and len(roots) == len(self._roots)
            and all(root is expected for root, expected in zip(roots, self._roots, strict=True))
            and all(all(map(operator.is_, _form(each), form)) for each, form in self._forms)
            and all(_layout(tensor) == layout for tensor, layout in self._layouts)
        )


def _entry(given: Any) -> tuple[dict[Any, Any], Hashable, object]:
    if isinstance(given, tuple) and len(given) == 3 and isinstance(given[0], dict):
        return given
    raise TypeError(f"expected a tuple (dict, key, object), got {given!r}")


def _form(given: object) -> list[object]:
    names = _OF_A_FUNCTION if isinstance(given, FunctionType) else ()
    own = getattr(given, "__dict__", None)
    # A class shows its dict in a new wrapper each time.
    return [type(given), own if isinstance(own, dict) else None, *(getattr(given, name) for name in names)]


def _keys(holder: Any) -> list[Any]:
    if isinstance(holder, dict):
        return list(holder)
    raise TypeError(f"expected a dict, got {holder!r}")


def _layout(tensor: Any) -> tuple[Hashable, ...]:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"expected a tensor, got {tensor!r}")
    keys = torch._C._dispatch_keys(tensor).raw_repr()
    return tensor.dtype, tensor.device, tensor.shape, tensor.stride(), tensor.requires_grad, keys
