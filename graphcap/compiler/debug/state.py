"""The tensors that a call may change, and how to put them back."""

from __future__ import annotations

from collections.abc import Iterator
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch

from graphcap.errors import GraphcapError

MAX_BYTES = 8 * 2**30

_OPAQUE = (type, ModuleType, FunctionType, MethodType, BuiltinFunctionType, str, bytes, int, float, torch.device)


class SavedState:
    """Copies of the memory of all tensors that can be reached from some objects, parameters excepted.

    Reached are items of containers and attributes of objects (a module's buffers, the tensors of a cache object).
    Python numbers and attributes that point to another tensor afterwards are not put back.
    """

    def __init__(self, *roots: Any) -> None:
        """Copy everything.

        Raises:
            GraphcapError: there are more than :data:`MAX_BYTES` to copy.
        """
        storages = {s.data_ptr(): s for tensor in reachable_tensors(*roots) if (s := _storage(tensor)) is not None}
        nbytes = sum(storage.nbytes() for storage in storages.values())
        if nbytes > MAX_BYTES:
            limit = f"{MAX_BYTES / 2**20:.0f} MiB"
            raise GraphcapError(
                f"the tensors that a call may change take {nbytes / 2**20:.0f} MiB, and at most {limit} are copied to "
                "put them back afterwards; use a smaller cache for this"
            )
        self._saved = [(storage, storage.clone()) for storage in storages.values()]

    def restore(self) -> None:
        """Put the memory back as it was."""
        for storage, saved in self._saved:
            storage.copy_(saved)


def reachable_tensors(*roots: Any) -> Iterator[torch.Tensor]:
    """Every tensor that is no parameter, in containers and attributes, each object once."""
    waiting, seen = list(roots), set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen or value is None or isinstance(value, (*_OPAQUE, torch.nn.Parameter)):
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple, set, frozenset)):
            waiting += value
        elif isinstance(value, dict):
            waiting += value.values()
        else:
            waiting += getattr(value, "__dict__", {}).values()
            slots = (name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ()))
            waiting += (getattr(value, name, None) for name in slots)


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    try:
        storage = tensor.untyped_storage()
        return storage if storage.nbytes() and storage.data_ptr() else None
    except (RuntimeError, NotImplementedError):  # sparse tensors have none
        return None
