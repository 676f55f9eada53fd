"""Everything of this room that is private to torch. Checked on torch 2.11 and 2.13 (signatures also on 2.15)."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import dlpack


def storage_address(tensor: torch.Tensor) -> int:
    """Where the tensor's storage begins; 0 when it has no memory, or none that a pointer describes (sparse tensors)."""
    if tensor.layout is not torch.strided:
        return 0
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0


def storage_range(tensor: torch.Tensor) -> tuple[int, int]:
    """Where the tensor's storage begins and ends; two times 0 where :func:`storage_address` is 0."""
    if tensor.layout is not torch.strided:
        return 0, 0
    try:
        storage = tensor.untyped_storage()
        start = storage.data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0, 0
    return (start, start + storage.nbytes()) if start else (0, 0)


def unowned(address: int, device: torch.device, nbytes: int) -> torch.UntypedStorage:
    """A storage over memory that somebody else keeps alive."""
    make = torch._C._construct_storage_from_data_pointer
    return cast(torch.UntypedStorage, make(address, device, nbytes))


def bytes_of(storage: torch.UntypedStorage, start: int, stop: int) -> torch.Tensor:
    """The bytes of a storage from ``start`` to ``stop``, uint8. Never an inference tensor."""
    with torch.inference_mode(False), torch.no_grad():
        empty = torch.empty(0, dtype=torch.uint8, device=storage.device)
        return empty.set_(storage, start, (stop - start,), (1,))


def over_storage(storage: torch.UntypedStorage, like: torch.Tensor, offset: int) -> torch.Tensor:
    """A plain tensor with ``like``'s dtype, size and stride, ``offset`` elements into ``storage``.

    Never an inference tensor, whatever mode the caller is in.
    """
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            return _over_storage(storage, like, offset)
    return _over_storage(storage, like, offset)


def _over_storage(storage: torch.UntypedStorage, like: torch.Tensor, offset: int) -> torch.Tensor:
    empty = torch.empty(0, dtype=like.dtype, device=like.device)
    return empty.set_(storage, offset, like.size(), like.stride())


def weak_view(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory, not kept alive: a plain tensor, detached, never an inference tensor."""
    storage = tensor.untyped_storage()
    address, nbytes = storage.data_ptr(), storage.nbytes()
    if nbytes == 0 or address == 0:
        with torch.inference_mode(False):
            return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return over_storage(unowned(address, tensor.device, nbytes), tensor, int(tensor.storage_offset()))


def fixed_storage(memory: torch.Tensor) -> torch.UntypedStorage:
    """A storage over a contiguous uint8 tensor that keeps it alive and that nobody can resize.

    A resize would give the memory back under the graphs that write into it.
    """
    with torch.inference_mode(False):
        return dlpack.from_dlpack(torch._C._to_dlpack(memory)).untyped_storage()


#: :func:`torch.autograd.graph.increment_version` for a tuple of tensors, without its look at what it was given.
increment_version: Callable[[tuple[torch.Tensor, ...]], None] = getattr(
    torch._C, "_increment_version", torch.autograd.graph.increment_version
)


#: :func:`torch.cuda.is_current_stream_capturing` without a frame of Python; none in a build without CUDA.
is_capturing: Callable[[], bool] = getattr(
    torch._C, "_cuda_isCurrentStreamCapturing", torch.cuda.is_current_stream_capturing
)


def current_raw_stream() -> Callable[[int], int]:
    """The function that takes a device index and returns the handle of its current stream."""
    return torch._C._cuda_getCurrentRawStream


def end_allocation_to_pool(index: int, handle: tuple[int, int]) -> bool:
    """Stop sending this device's allocations into a graph pool after ``capture_end`` has failed.

    Returns:
        True when torch had not stopped it itself; the aborted capture's hold on the pool is then given up, too.
    """
    try:
        torch._C._cuda_endAllocateToPool(index, handle)
    except RuntimeError:
        return False
    torch._C._cuda_releasePool(index, handle)
    return True


class StorageWatch:
    """How many bytes some tensors still take, views of them included, without keeping them alive."""

    def __init__(self) -> None:
        self._watched: list[tuple[StorageWeakRef, int]] = []

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        """Watch the storage of this tensor, and return the tensor. One thread at a time."""
        storage = tensor.untyped_storage()
        alive = [each for each in self._watched if not each[0].expired()]
        self._watched = [*alive, (StorageWeakRef(storage), storage.nbytes())]
        return tensor

    def nbytes(self) -> int:
        """The bytes of the storages that are alive."""
        return sum(nbytes for storage, nbytes in self._watched if not storage.expired())


def break_trace(reason: str) -> None:
    """For traced code: its graph ends here, and Python goes on. Where it may not end, an error has the reason."""
    torch._dynamo.graph_break(reason)
