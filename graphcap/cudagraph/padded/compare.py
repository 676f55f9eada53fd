"""How far two results of the same call are apart."""

from __future__ import annotations

from collections.abc import Iterator

import torch

#: Relative to the size of a row: what another choice of kernels may change, and a division by the wrong size exceeds.
_TOLERANCE = {torch.float64: 1e-6, torch.complex128: 1e-6, torch.float32: 5e-3, torch.complex64: 5e-3}
_TOLERANCE_HALF = 5e-2  #: for everything with fewer bits
_PART = 2**24  #: elements (or words of eight bytes) compared at once: a cache may fill the device


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference between two tensors of one size and dtype; 0 where all are equal, NaN equal to NaN.

    Infinite where only one is NaN, and for numbers that are no floats.
    """
    if _same_bytes(a, b):
        return 0.0
    return max(_distance(*pair) for pair in _in_parts(a.detach(), b.detach()))


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    if torch.equal(a, b):
        return 0.0
    differs = ~((a == b) | ((a != a) & (b != b)))
    if not bool(differs.any()):
        return 0.0
    if not a.is_floating_point():
        return float("inf")
    largest = (a[differs].double() - b[differs].double()).abs().max().item()
    return float(largest) if largest == largest else float("inf")


def departs(value: torch.Tensor, truth: torch.Tensor) -> bool:
    """Whether a row (the last dim) of ``value`` is further from ``truth`` than rounding explains.

    Numbers that are no floats must be equal.
    """
    if _same_bytes(value, truth):
        return False
    tolerance = _TOLERANCE.get(truth.dtype, _TOLERANCE_HALF)
    return any(_departs(*pair, tolerance) for pair in _in_parts(value.detach(), truth.detach()))


def _departs(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    if _distance(a, b) == 0.0:
        return False
    if not a.is_floating_point():
        return True
    equal = (a == b) | ((a != a) & (b != b))
    apart = torch.where(equal, 0, a.double() - b.double())
    if not bool(apart.isfinite().all()):
        return True
    size = torch.where(b.isfinite(), b, 0).double()
    rows, sizes = (apart.norm(dim=-1), size.norm(dim=-1)) if b.dim() > 1 else (apart.abs(), size.abs())
    return bool((rows > tolerance * (sizes + sizes.mean())).any())


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one size and dtype hold the same bytes, eight looked at as one; False where they cannot be
    looked at in this way, too. It is what most state turns out to be, and a look waits for the device."""
    if not (_is_of_words(a) and _is_of_words(b)):
        return False
    words = (each.detach().view(-1).view(torch.int64).split(_PART) for each in (a, b))
    return all(torch.equal(*pair) for pair in zip(*words, strict=True))


def _is_of_words(tensor: torch.Tensor) -> bool:
    if tensor.layout is not torch.strided or not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
        return False
    return tensor.nbytes % 8 == 0 and tensor.storage_offset() * tensor.element_size() % 8 == 0


def is_finite(value: torch.Tensor) -> bool:
    """Whether a tensor holds no infinity and no NaN."""
    if not (value.is_floating_point() or value.is_complex()):
        return True
    return all(bool(part.isfinite().all()) for part, _ in _in_parts(value.detach(), value.detach()))


def _in_parts(a: torch.Tensor, b: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Both, cut into parts that leave room for what a comparison allocates; rows stay whole. In a dtype that can be
    calculated with."""
    sizes = list(a.shape if a.dim() == 1 else a.shape[:-1])
    if a.numel() <= _PART or not sizes or max(sizes) < 2:
        yield _comparable(a), _comparable(b)
        return
    dim = sizes.index(max(sizes))
    for one, other in zip(a.tensor_split(2, dim), b.tensor_split(2, dim), strict=True):
        yield from _in_parts(one, other)


def _comparable(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_complex():
        return torch.view_as_real(tensor.resolve_conj())
    small = tensor.is_floating_point() and tensor.element_size() == 1
    return tensor.float() if small else tensor
