"""A stack of MLPs whose rows have nothing to do with each other and that keeps no state.

Its result for a row does not depend on what else was in the batch or ran before: what threads that share a model and
its graphs must leave true. An opaque custom op in each layer runs live, so that a plan has several segments.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.models import gated_mlp


@torch.library.custom_op("lab::sharpen", mutates_args=())
def sharpen(x: Tensor) -> Tensor:
    """x [num_tokens, hidden] scaled to the largest value of each row."""
    return x / x.abs().amax(-1, keepdim=True).clamp(min=1e-6)


@sharpen.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class RowWise(nn.Module):
    """``forward(x)``, [num_tokens, hidden] to the same."""

    def __init__(self, hidden: int, num_layers: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(hidden) for _ in range(num_layers))
        self.gate_ups = nn.ParameterList(nn.Parameter(torch.empty(4 * hidden, hidden)) for _ in range(num_layers))
        self.downs = nn.ParameterList(nn.Parameter(torch.empty(hidden, 2 * hidden)) for _ in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        for norm, gate_up, down in zip(self.norms, self.gate_ups, self.downs, strict=True):
            x = x + gated_mlp(torch.ops.lab.sharpen(norm(x)), gate_up, down)
        return x


def build_rowwise(hidden: int, num_layers: int, device: torch.device, dtype: torch.dtype, seed: int) -> RowWise:
    """Seeded random weights, scaled so that activations stay near one."""
    model = RowWise(hidden, num_layers)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
    return model.to(device, dtype).eval().requires_grad_(False)
