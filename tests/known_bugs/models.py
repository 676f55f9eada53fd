"""What the tests of known bugs have in common: settings, a call beside eager, and what the report says afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import graphcap

WIDTH = 8
SETTINGS: dict[str, Any] = {"compiler": "eager", "simulate": True, "cache": False}


class Mlp(nn.Module):
    """Rows are independent."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(x)))


class Beside:
    """A compiled callable and its original; each call goes to both, and must give the same."""

    def __init__(self, model: Any, dims: Any, **settings: Any) -> None:
        self.original = copy.deepcopy(model) if isinstance(model, nn.Module) else model
        self.fast = graphcap.compile(model, dynamic_arg_dims=dims, **SETTINGS, **settings)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        theirs = copy.deepcopy((args, kwargs))
        with torch.no_grad():
            expected = self.original(*theirs[0], **theirs[1])
            got = self.fast(*args, **kwargs)
        assert_same((got, args, kwargs), (expected, *theirs))
        return got

    @property
    def plans(self) -> list[Any]:
        return plans_of(self.fast)

    @property
    def replays(self) -> int:
        return sum(plan.replays for plan in self.plans)

    @property
    def region(self) -> Any:
        (region,) = graphcap.explain(self.fast).regions
        return region


def assert_same(got: Any, expected: Any) -> None:
    """Tensors are close, have one layout, and everything else is equal."""
    mine, theirs = tree_leaves(got), tree_leaves(expected)
    assert len(mine) == len(theirs)
    for one, other in zip(mine, theirs, strict=True):
        if isinstance(other, Tensor):
            torch.testing.assert_close(one, other)
            assert one.stride() == other.stride()
        else:
            assert one == other


def plans_of(target: Any) -> list[Any]:
    return [plan for region in graphcap.explain(target).regions for plan in region.plans]


def rows(n: int) -> Tensor:
    return torch.randn(n, WIDTH)


def repeated(call: Callable[..., Any], times: int, *args: Any, **kwargs: Any) -> Any:
    for _ in range(times):
        result = call(*args, **kwargs)
    return result
