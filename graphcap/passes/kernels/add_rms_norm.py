"""``torch.ops.graphcap.add_rms_norm``: residual add and RMSNorm in one read and two writes per row.

On CUDA the op launches the Triton kernel of :mod:`graphcap.passes.kernels.add_rms_norm_triton`; elsewhere, and where
Triton is missing, it runs the same arithmetic in plain PyTorch. It is registered on a ``torch.library.Library`` rather
than through ``custom_op``, whose Python wrapper adds host time to every live call.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch

#: The kernel keeps one row in registers.
MAX_HIDDEN = 16384

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_LIBRARY = torch.library.Library("graphcap", "FRAGMENT")
_LIBRARY.define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, bool weight_in_fp32) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, weight_in_fp32: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """``new = residual + x; normed = new / sqrt(mean(new ** 2) + eps) * weight``, the norm accumulated in fp32.

    Args:
        x: ``[..., hidden]`` in bf16, fp16 or fp32, ``1 <= hidden <= 16384``.
        residual: as ``x``.
        weight: ``[hidden]``, of the dtype of ``x``; also fp32 with ``weight_in_fp32``.
        eps: added to the mean of the squares.
        weight_in_fp32: ``True`` multiplies by the weight in fp32 and rounds once (``F.rms_norm``); ``False`` rounds the
            normed row to the dtype of ``x`` first and multiplies in that dtype (Llama as Hugging Face writes it).

    Returns:
        ``(normed, new_residual)``, both contiguous, shaped and typed as ``x``. ``new_residual`` is rounded to the dtype
        before it is normed, as two separate ops would do.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    result: tuple[torch.Tensor, torch.Tensor] = torch.ops.graphcap.add_rms_norm.default(
        x, residual, weight, eps, weight_in_fp32
    )
    return result


@functools.cache
def has_triton() -> bool:
    """Whether the Triton kernel can be imported; looks for the package without importing it."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _launch() -> Callable[..., None]:
    from graphcap.passes.kernels.add_rms_norm_triton import launch

    return launch


def _check(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, weight_in_fp32: bool) -> None:
    """Refuse what the kernel would read out of bounds or misinterpret."""
    if x.dtype not in DTYPES or residual.dtype != x.dtype:
        raise ValueError(
            f"add_rms_norm: x and residual must share one of the dtypes {', '.join(map(str, DTYPES))}, "
            f"got {x.dtype} and {residual.dtype}"
        )
    if x.dim() == 0 or x.shape != residual.shape or weight.shape != x.shape[-1:]:
        raise ValueError(
            "add_rms_norm: expected x and residual [..., hidden] and weight [hidden], "
            f"got {tuple(x.shape)}, {tuple(residual.shape)} and {tuple(weight.shape)}"
        )
    if weight.dtype != x.dtype and not (weight_in_fp32 and weight.dtype == torch.float32):
        raise ValueError(
            f"add_rms_norm: weight must be {x.dtype}, or float32 with weight_in_fp32=True; "
            f"got {weight.dtype} with weight_in_fp32={weight_in_fp32}"
        )
    if not (x.device == residual.device == weight.device):
        raise ValueError(
            f"add_rms_norm: x, residual and weight must be on one device, "
            f"got {x.device}, {residual.device} and {weight.device}"
        )


def _plain(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, weight_in_fp32: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(x, residual, weight, weight_in_fp32)
    new = (residual + x).contiguous()
    wide = new.to(torch.float32)
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    normed = (normed * weight).to(x.dtype) if weight_in_fp32 else weight * normed.to(x.dtype)
    return normed, new


def _triton(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, weight_in_fp32: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    if not has_triton() or not 1 <= x.shape[-1] <= MAX_HIDDEN:
        return _plain(x, residual, weight, eps, weight_in_fp32)
    _check(x, residual, weight, weight_in_fp32)
    # Nothing to do for the graphs that the pass rewrites; a direct caller of the op may bring any strides.
    x, residual, weight = x.contiguous(), residual.contiguous(), weight.contiguous()
    normed, new = torch.empty_like(x), torch.empty_like(x)
    _launch()(x, residual, weight, normed, new, eps, weight_in_fp32)
    return normed, new


def _fake(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, weight_in_fp32: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(x, residual, weight, weight_in_fp32)
    return x.new_empty(x.shape), x.new_empty(x.shape)


_LIBRARY.impl("add_rms_norm", _plain, "CompositeExplicitAutograd")
_LIBRARY.impl("add_rms_norm", _triton, "CUDA")
torch.library.register_fake("graphcap::add_rms_norm", _fake, lib=_LIBRARY)
