"""Other values in padded rows: what no real row may notice."""

from __future__ import annotations

import torch

from graphcap.cudagraph.padded.corner import around, corner

#: What padded rows of floats hold in a variant, at least; larger than what a real row brings, and far from overflow.
_LARGE = {torch.float16: 16.0, torch.float32: 1e3, torch.float64: 1e3, torch.bfloat16: 1e3}
_LARGE_OTHERS = 16.0


def vary(tensor: torch.Tensor, size: torch.Size, seed: int) -> None:
    """Write other values around the corner: large floats of both signs, or what other rows hold.

    They are worked out on the host: kernels of the device that nothing else uses would have to be loaded for it.
    """
    generator = torch.Generator().manual_seed(seed)
    for dim, rest in around(tensor, size):
        if size[dim] == 0:
            continue
        if tensor.is_floating_point():
            real = corner(tensor, size).detach().cpu().float().abs()
            largest = float(torch.where(real.isfinite(), real, 0).max()) if real.numel() else 0.0
            scale = max(4 * largest, _LARGE.get(tensor.dtype, _LARGE_OTHERS))
            scale = min(scale, torch.finfo(tensor.dtype).max / 64)
            rest.copy_((torch.rand(rest.shape, generator=generator) * 2 - 1) * scale)
        else:
            rows = torch.randint(size[dim], (rest.shape[dim],), generator=generator)
            found = corner(tensor, [*tensor.shape[: dim + 1], *size[dim + 1 :]]).detach().cpu()
            rest.copy_(found.index_select(dim, rows))
