"""Static memory for copied inputs and bridges: outside the pool, at addresses that do not move."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch

from graphcap.cudagraph.hardware.device import GraphDevice
from graphcap.cudagraph.private import over_storage, unowned

ALIGNMENT = 512  #: bytes; what the CUDA caching allocator gives, so that compiled kernels find what they assume


def span(tensor: torch.Tensor) -> int:
    """How many elements lie between a tensor's first and last one, both included."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True))


def span_bytes(tensor: torch.Tensor) -> int:
    """The bytes that a copy with the same strides takes."""
    return span(tensor) * tensor.element_size()


def overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the ranges of memory meet in which two tensors lie. May say yes too often: columns of one buffer."""
    if a.device != b.device or torch.strided is not a.layout or torch.strided is not b.layout:
        return False
    first, second = a.data_ptr(), b.data_ptr()
    return first < second + span_bytes(b) and second < first + span_bytes(a)


def overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether two indices may reach the same element (an expanded or unfolded tensor). May say yes too often."""
    reach = 0
    dims = zip(tensor.stride(), tensor.size(), strict=True)
    for stride, size in sorted((stride, size) for stride, size in dims if size > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """Every element between the first and the last, as ``[span]``: what can be copied when indices overlap."""
    return tensor.as_strided((span(tensor),), (1,), tensor.storage_offset())


def copy_into(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy between tensors of the same size and strides, also where indices overlap."""
    with torch.no_grad():
        if overlaps_itself(target):
            flat(target).copy_(flat(source))
        else:
            target.copy_(source)


def buffer_like(block: torch.Tensor, offset: int, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with the size, strides and dtype of ``tensor`` at ``offset`` bytes into ``block``, a storage of its own.

    The block must outlive it.
    """
    nbytes = span_bytes(tensor)
    if nbytes == 0:
        with torch.inference_mode(False):
            return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=block.device)
    return over_storage(unowned(block.data_ptr() + offset, block.device, nbytes), tensor, 0)


def aligned_block(device: GraphDevice, nbytes: int) -> torch.Tensor:
    """A uint8 tensor ``[nbytes]`` that begins at a multiple of :data:`ALIGNMENT`."""
    block = device.allocate(nbytes + ALIGNMENT)
    return block[-block.data_ptr() % ALIGNMENT :][:nbytes]


def offsets_for(tensors: Sequence[torch.Tensor]) -> tuple[list[int], int]:
    """Where to place copies of ``tensors`` one after the other: their offsets, and the bytes in all."""
    offsets, end = [], 0
    for tensor in tensors:
        offsets.append(end)
        end += -(-span_bytes(tensor) // ALIGNMENT) * ALIGNMENT
    return offsets, end


class Arena:
    """One block of memory for the copied inputs of every plan of a runner; no two of its plans run at the same time.

    The block belongs to the plans: it goes with the last of them.

    Attributes:
        holder: the padded replay whose padding lies in it; ``None`` when something else has been copied in since.
    """

    def __init__(self, device: GraphDevice) -> None:
        self.holder: object = None
        self._device = device
        self._block: Callable[[], torch.Tensor | None] = lambda: None

    def buffers(self, tensors: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """A buffer for each tensor, and the block that must be kept alive for them.

        A plan that needs more than there is gets a larger block; earlier plans keep theirs.
        """
        offsets, nbytes = offsets_for(tensors)
        block = self._block()
        if block is None or block.numel() < nbytes:
            block = aligned_block(self._device, nbytes)
            self._block = weakref.ref(block)
        return [buffer_like(block, offset, tensor) for offset, tensor in zip(offsets, tensors, strict=True)], block
