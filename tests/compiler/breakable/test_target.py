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
