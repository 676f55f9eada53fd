"""A number for each page of a tensor's memory, by which one finds the pages that a call has written."""

from __future__ import annotations

import torch

_PART_BYTES = 2**26  #: looked at in one go, which takes the same again


def digests(memory: torch.Tensor, page_bytes: int) -> torch.Tensor:
    """One number for each page; another one where any 8 bytes of the page are others, but for a chance of 2**-60 or so.

    Args:
        memory: uint8 ``[nbytes]``, contiguous, at an address that is a multiple of 8. The last page may be a short one.
        page_bytes: a multiple of 8.

    Returns:
        int64 ``[num_pages]``.
    """
    weights = _weights(page_bytes // 8, memory.device)
    step = max(1, _PART_BYTES // page_bytes) * page_bytes
    full = memory.numel() // page_bytes * page_bytes
    found = [_sums(part, weights) for part in memory[:full].split(step) if part.numel()]
    if full < memory.numel():
        last = torch.zeros(page_bytes, dtype=torch.uint8, device=memory.device)
        last[: memory.numel() - full].copy_(memory[full:])
        found.append(_sums(last, weights))
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64, device=memory.device)


def digest(tensor: torch.Tensor) -> int:
    """One number for all bytes of a tensor, in the order of its indices. It may be larger than memory has room for."""
    if tensor.numel() == 0:
        return 0
    if tensor.dim() and tensor.numel() * tensor.element_size() > _PART_BYTES and max(tensor.shape) > 1:
        dim = next(dim for dim, size in enumerate(tensor.shape) if size > 1)
        return hash(tuple(digest(part) for part in tensor.tensor_split(2, dim)))
    memory = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)
    return hash(tuple(digests(memory, 4096).tolist()))


def _sums(memory: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (memory.view(torch.int64).view(-1, weights.numel()) * weights).sum(1)


def _weights(num_words: int, device: torch.device) -> torch.Tensor:
    """Odd numbers without a pattern: a product with one tells any two words apart."""
    numbers = torch.arange(1, num_words + 1, device=device) * 0x1E3779B97F4A7C15
    numbers = (numbers ^ (numbers >> 30)) * 0x3F58476D1CE4E5B9
    return (numbers ^ (numbers >> 27)) | 1
