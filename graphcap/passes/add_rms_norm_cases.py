"""The numeric self-test of the add+RMSNorm fusion: both spellings, every dtype, shapes the kernel must get right."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from graphcap.passes.kernels.add_rms_norm import DTYPES, add_rms_norm
from graphcap.passes.selftest import NumericCase

#: One row; a hidden size that is no power of two; several ranks; wide rows.
SHAPES = ((1, 8), (3, 48), (2, 3, 128), (2, 1, 5, 100), (5, 4096))


def llama(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, ...]:
    """As Hugging Face Llama writes it: rounds to the dtype, then multiplies by the weight."""
    new = residual + x
    wide = new.to(torch.float32)
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype), new


def rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, ...]:
    """As ``torch.nn.RMSNorm`` computes it: multiplies in fp32, then rounds."""
    new = residual + x
    return torch.nn.functional.rms_norm(new, weight.shape, weight, eps), new


def exact(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, ...]:
    """The formula in the dtype of the inputs (float64), nothing rounded on purpose."""
    new = residual + x
    return new / torch.sqrt(new.pow(2).mean(-1, keepdim=True) + eps) * weight, new


def fused(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, weight_in_fp32: bool
) -> tuple[torch.Tensor, ...]:
    """The replacement."""
    return add_rms_norm(x, residual, weight, eps, weight_in_fp32)


def numeric_cases(device: torch.device, eps: float = 1e-5) -> Iterator[NumericCase]:
    """Every combination of spelling, dtype and shape, on seeded random inputs on ``device``."""
    generator = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        for shape in SHAPES:
            x, residual = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
            weight = (1 + 0.1 * torch.randn(shape[-1:], generator=generator)).to(device, dtype)
            for pattern, weight_in_fp32 in ((llama, False), (rms_norm, True)):
                yield NumericCase(
                    f"{pattern.__name__} {str(dtype).removeprefix('torch.')} {shape}",
                    (x, residual, weight),
                    functools.partial(pattern, eps=eps),
                    functools.partial(fused, eps=eps, weight_in_fp32=weight_in_fp32),
                    functools.partial(exact, eps=eps),
                )
