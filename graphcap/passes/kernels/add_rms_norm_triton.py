"""The Triton kernel behind ``torch.ops.graphcap.add_rms_norm``. Imported only where Triton is installed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from graphcap.passes.kernels.direct_launch import DirectLaunch


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def add_rms_norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    residual_ptr,
    weight_ptr,
    normed_ptr,
    new_ptr,
    hidden,
    eps,
    WEIGHT_IN_FP32: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row; every tensor is contiguous, ``[rows, hidden]`` or ``[hidden]``; ``BLOCK >= hidden``."""
    # int64: rows * hidden passes 2 ** 31 for long prefills.
    start = tl.program_id(0).to(tl.int64) * hidden
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    dtype = new_ptr.dtype.element_ty

    x = tl.load(x_ptr + start + column, mask=inside, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + start + column, mask=inside, other=0.0).to(tl.float32)
    # Rounded before it is normed: the next layer reads the rounded residual, and eager norms that one.
    new = (residual + x).to(dtype)
    tl.store(new_ptr + start + column, new, mask=inside)

    wide = new.to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / hidden + eps)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if not WEIGHT_IN_FP32:
        normed = normed.to(dtype).to(tl.float32)
    # The product of two bf16 or fp16 values is exact in fp32, so one rounding at the end equals eager's multiply.
    tl.store(normed_ptr + start + column, (normed * weight).to(dtype), mask=inside)


def launch(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    normed: torch.Tensor,
    new: torch.Tensor,
    eps: float,
    weight_in_fp32: bool,
) -> None:
    """Fill ``normed`` and ``new``; all of ``[..., hidden]``, contiguous, on one device; ``weight`` is ``[hidden]``."""
    hidden = x.shape[-1]
    rows = x.numel() // hidden
    if rows == 0:
        return
    block = triton.next_power_of_2(hidden)
    # 16 elements per thread; 16 warps at most, which is also what a GPU with 64-wide wavefronts can hold.
    num_warps = min(max(block // 512, 1), 16)
    kind = x.dtype, weight.dtype, hidden, weight_in_fp32
    tensors = x, residual, weight, normed, new
    _launch(kind, rows, tensors, (hidden, eps, weight_in_fp32, block), num_warps=num_warps)


_launch = DirectLaunch(add_rms_norm_kernel)
