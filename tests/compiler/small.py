"""Models small enough to compile in a test, and what tests of dumps and reports ask of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphcap.compiler.backend import graphcap

ROOT = Path(__file__).parents[2]


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unsqueeze(0).chunk(3, dim=-1)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).squeeze(0))


class Cached(nn.Module):
    """Writes its rows into a cache, whose last row belongs to nobody, and counts its calls."""

    def __init__(self, num_rows: int = 33) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("cache", torch.zeros(num_rows, 4))
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor, slots: Tensor) -> Tensor:
        self.calls += 1
        self.cache[slots] = torch.where((slots >= 0)[:, None], x, 0)
        return self.linear(x) + self.cache[slots]


class Stack(nn.Module):
    """Layers over ``[num_tokens, width]``: with three of them pieces 2 and 4 are twins, as are the attentions."""

    def __init__(self, num_layers: int = 3, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width) for _ in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Mlp(nn.Module):
    """One piece without attention: the cheapest thing that Inductor can compile."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x * self.weight) + 1


def compiled(module: nn.Module, *, dynamic: bool | None = None, **options: Any) -> nn.Module:
    """``module`` compiled in place; pieces run without Inductor unless ``compiler`` says otherwise."""
    module.eval()
    module.compile(backend=graphcap, dynamic=dynamic, options={"compiler": "eager", **options})
    return module


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh Python process that can import the package."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=300, check=False
    )
