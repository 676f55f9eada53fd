"""How far two results of the same call are apart."""

from __future__ import annotations

import torch

#: Relative to the size of a row: what another choice of kernels may change, and a division by the wrong size exceeds.
_TOLERANCE = {torch.float64: 1e-6, torch.complex128: 1e-6, torch.float32: 5e-3, torch.complex64: 5e-3}
_TOLERANCE_HALF = 5e-2  #: for everything with fewer bits


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference between two tensors of one size and dtype; 0 where all are equal, NaN equal to NaN.

    Infinite where only one is NaN, and for numbers that are no floats.
    """
    a, b = _comparable(a), _comparable(b)
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
    if distance(value, truth) == 0.0:
        return False
    tolerance = _TOLERANCE.get(truth.dtype, _TOLERANCE_HALF)
    a, b = _comparable(value), _comparable(truth)
    if not a.is_floating_point():
        return True
    equal = (a == b) | ((a != a) & (b != b))
    apart = torch.where(equal, 0, a.double() - b.double())
    if not bool(apart.isfinite().all()):
        return True
    size = torch.where(b.isfinite(), b, 0).double()
    rows, sizes = (apart.norm(dim=-1), size.norm(dim=-1)) if b.dim() > 1 else (apart.abs(), size.abs())
    return bool((rows > tolerance * (sizes + sizes.mean())).any())


def _comparable(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    if tensor.is_complex():
        return torch.view_as_real(tensor.resolve_conj())
    small = tensor.is_floating_point() and tensor.element_size() == 1
    return tensor.float() if small else tensor
