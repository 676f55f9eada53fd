"""What a target has recorded ends with what it was recorded for, in reports as well."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import graphcap
from tests.compiler.breakable.like_original import CALLS, breakable, rows


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


class Cache:
    def __init__(self) -> None:
        self.keys = torch.zeros(4)


class Cached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        cache.keys.add_(1)
        return self.fc(x) + cache.keys


def test_a_cache_per_request_leaves_nothing_in_the_report() -> None:
    model, x = breakable(Cached()), rows()
    lasting = Cache()
    for _ in range(CALLS):
        model(x, lasting)
    for _ in range(20):
        cache = Cache()
        for _ in range(3):
            model(x, cache)
    del cache
    gc.collect()
    model(x, lasting)
    (region,) = graphcap.explain(model).regions
    assert region.replays >= 2


def test_after_a_reset_everything_is_recorded_anew_and_found() -> None:
    model, x = breakable(nn.Linear(4, 4)), rows()
    for _ in range(CALLS):
        expected = model(x)
    graphcap.reset()
    assert not graphcap.explain().regions
    for _ in range(CALLS):
        assert torch.equal(model(x), expected)
    (region,) = graphcap.explain(model).regions
    assert region.plans
    graphcap.release(model)
    (region,) = graphcap.explain(model).regions
    assert not region.plans


def test_after_a_reset_a_call_that_was_one_too_many_is_recorded() -> None:
    captured = breakable(lambda x, k: x + k, max_plans=2)
    x = torch.zeros(4)
    for k in range(20):
        captured(x, k)
    assert len(graphcap.explain(captured).regions) < 20
    graphcap.reset()
    for _ in range(CALLS):
        assert torch.equal(captured(x, 19), x + 19)
    (region,) = graphcap.explain(captured).regions
    assert region.replays >= 2
