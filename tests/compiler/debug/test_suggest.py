"""``graphcap.suggest_ladder``: from whatever knows the sizes to a value for ``capture_sizes``."""

from __future__ import annotations

import dataclasses

import pytest

import graphcap
from graphcap.compiler.debug.report import Report, SettingReport
from graphcap.errors import ConfigError
from tests.compiler.debug.reports import plan, region, traffic

HISTOGRAM = {7: 100, 8: 900, 60: 50, 64: 500, 500: 1}
TRAFFIC = traffic({(n,): ((512,), calls) for n, calls in HISTOGRAM.items()})
REGION = region("forward_0", traffic=TRAFFIC, plans=(plan(8, 2.0), plan(64, 4.0)))


@pytest.mark.parametrize(
    "seen", [HISTOGRAM, TRAFFIC, REGION, Report("model", (REGION,))], ids=lambda s: type(s).__name__
)
def test_it_reads_sizes_from_anything_that_knows_them(seen) -> None:
    found = graphcap.suggest_ladder(seen, 3)
    assert found.sizes == (8, 64, 500)
    assert (found.padded_tokens, found.live_calls) == (300, 0)
    assert graphcap.Config(capture_sizes=found.sizes).capture_sizes == found.sizes


def test_regions_add_up() -> None:
    other = region("forward_1", traffic=traffic({(7,): ((8,), 5000)}))
    assert graphcap.suggest_ladder(Report("model", (REGION, other)), 4).sizes == (7, 8, 64, 500)
    assert graphcap.suggest_ladder(Report("model", (REGION,)), 4).sizes == (8, 60, 64, 500)


def test_leaving_the_rare_ones_live() -> None:
    found = graphcap.suggest_ladder(HISTOGRAM, 2, live_cost=1000)
    assert (found.sizes, found.live_calls) == ((8, 64), 1)
    with pytest.raises(ConfigError, match=r"2 plans cannot cover all 5 sizes .* it takes 3"):
        graphcap.suggest_ladder(HISTOGRAM, 2)


def test_empty_batches_ask_for_no_rung() -> None:
    """They run live whatever the ladder is."""
    assert graphcap.suggest_ladder(HISTOGRAM | {0: 7}, 3).sizes == (8, 64, 500)
    seen = region("forward_0", traffic=traffic({(0,): (None, 2), (3,): ((4,), 5)}))
    assert graphcap.suggest_ladder(seen, 4).sizes == (3,)
    with pytest.raises(ConfigError, match="no calls with a size"):
        graphcap.suggest_ladder({0: 7}, 3)


def test_covering_up_to_a_size() -> None:
    assert graphcap.suggest_ladder(HISTOGRAM, 2, cover_up_to=64).sizes == (8, 64)
    assert graphcap.suggest_ladder(HISTOGRAM, 2, cover_up_to=70).sizes == (8, 70)


def test_a_budget_in_bytes_uses_what_a_plan_takes() -> None:
    seen = Report("model", (REGION,))
    assert graphcap.suggest_ladder(seen, 10, max_bytes=9 * 2**20).sizes == (8, 64, 500)
    with pytest.raises(ConfigError, match="2 plans cannot cover"):
        graphcap.suggest_ladder(seen, 10, max_bytes=9 * 2**20 - 1)
    pool = dataclasses.replace(plan(128, 100.0 + 3.0), shared_mib=100.0)
    pooled = dataclasses.replace(REGION, plans=(*REGION.plans, pool))
    assert graphcap.suggest_ladder(pooled, 10, max_bytes=109 * 2**20).sizes == (8, 64, 500)
    with pytest.raises(ConfigError, match="2 plans cannot cover"):
        graphcap.suggest_ladder(pooled, 10, max_bytes=109 * 2**20 - 1)
    with pytest.raises(ConfigError, match="needs a report with captured plans"):
        graphcap.suggest_ladder(HISTOGRAM, 10, max_bytes=2**30)


def test_the_ratio_is_that_of_the_report() -> None:
    strict = region("strict", traffic=TRAFFIC, settings=(SettingReport("max_padding_ratio", 0.0, "code"),))
    assert graphcap.suggest_ladder(strict, 5).sizes == (7, 8, 60, 64, 500)
    assert graphcap.suggest_ladder(strict, 3, max_padding_ratio=0.5).sizes == (8, 64, 500)
    with pytest.raises(ConfigError, match="it takes 5"):
        graphcap.suggest_ladder(strict, 4)


def test_other_dims_weigh_the_padding() -> None:
    served = {(1, 1000): ((4, 1000), 1), (3, 1): ((4, 1), 9), (4, 1): ((4, 1), 1)}
    seen = traffic(served, "batch", "seq")
    assert graphcap.suggest_ladder(seen, 2, dim="batch", max_padding_ratio=0.9).sizes == (1, 4)
    assert graphcap.suggest_ladder({1: 1, 3: 9, 4: 1}, 2, max_padding_ratio=0.9).sizes == (3, 4)
    with pytest.raises(ConfigError, match="dim= one of batch, seq"):
        graphcap.suggest_ladder(seen, 2)


def test_requests_beside_tokens_weigh_nothing() -> None:
    served = {(1, 1000): ((4, 1000), 1), (3, 1): ((4, 1), 9), (4, 1): ((4, 1), 1)}
    seen = traffic(served, "num_tokens", "num_reqs")
    assert graphcap.suggest_ladder(seen, 2, max_padding_ratio=0.9).sizes == (3, 4)


def test_nothing_counted() -> None:
    with pytest.raises(ConfigError, match="no calls with a size of 'num_tokens'"):
        graphcap.suggest_ladder(Report("model", ()), 3)
    with pytest.raises(ConfigError, match="'seq'"):
        graphcap.suggest_ladder(TRAFFIC, 3, dim="seq")
