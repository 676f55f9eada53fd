"""The suggested ladder is the best one there is, by the look-up of a real ladder and by trying all others."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphcap.cudagraph.counters.suggest import Demand, Prices, best_rungs
from graphcap.cudagraph.dispatch.ladder import Ladder
from graphcap.errors import ConfigError

demands = st.dictionaries(st.integers(1, 30), st.tuples(st.integers(0, 9), st.integers(1, 3)), max_size=7).map(
    lambda seen: [Demand(size, calls, calls * others) for size, (calls, others) in seen.items()]
)
budgets = st.integers(0, 5)
ratios = st.sampled_from([0.0, 0.3, 0.5, 0.9])


def cost(seen: list[Demand], rungs: tuple[int, ...], ratio: float, prices: Prices) -> float:
    """What a ladder costs, by definition."""
    ladder = Ladder(rungs, ratio)
    total = len(rungs) * prices.plan
    for each in seen:
        rung = ladder.rung_of(each.size)
        if rung is not None:
            total += (rung - each.size) * each.rows * prices.token
        elif math.isinf(prices.live):
            return math.inf
        else:
            total += each.calls * prices.live
    return total


def every_ladder(max_plans: int):
    return itertools.chain.from_iterable(itertools.combinations(range(1, 31), k) for k in range(max_plans + 1))


def seen_ladders(seen: list[Demand], max_plans: int):
    sizes = sorted(each.size for each in seen)
    return itertools.chain.from_iterable(itertools.combinations(sizes, k) for k in range(max_plans + 1))


@settings(max_examples=150, deadline=None)
@given(demands, budgets, ratios, st.sampled_from([0, 1, 7]), st.sampled_from([0, 1, 4, 60]), st.integers(0, 2))
def test_no_ladder_costs_less(seen, max_plans, ratio, live, plan, token) -> None:
    prices = Prices(token=token, live=live, plan=plan)
    found = best_rungs(seen, max_plans, ratio, prices)
    assert len(found.sizes) <= max_plans
    assert found.cost == cost(seen, found.sizes, ratio, prices)
    assert found.cost == min(cost(seen, rungs, ratio, prices) for rungs in seen_ladders(seen, max_plans))


@settings(max_examples=150, deadline=None)
@given(demands, budgets, ratios)
def test_every_size_is_covered_or_it_says_how_many_plans_that_takes(seen, max_plans, ratio) -> None:
    costs = {rungs: cost(seen, rungs, ratio, Prices()) for rungs in seen_ladders(seen, len(seen))}
    needed = min(len(rungs) for rungs, each in costs.items() if each < math.inf)
    if needed > max_plans:
        with pytest.raises(ConfigError, match=f"it takes {needed}"):
            best_rungs(seen, max_plans, ratio, Prices())
        return
    found = best_rungs(seen, max_plans, ratio, Prices())
    assert found.cost == min(each for rungs, each in costs.items() if len(rungs) <= max_plans)
    assert found.live_calls == 0
    assert all(Ladder(found.sizes, ratio).rung_of(each.size) for each in seen)


@settings(max_examples=15, deadline=None)
@given(demands.filter(lambda seen: len(seen) < 5), st.integers(0, 2), ratios, st.integers(0, 9))
def test_sizes_that_were_never_seen_make_no_better_ladder(seen, max_plans, ratio, plan) -> None:
    prices = Prices(live=100, plan=plan)  # more than 29 tokens of padding times 3
    best = min(cost(seen, rungs, ratio, prices) for rungs in every_ladder(max_plans))
    assert best_rungs(seen, max_plans, ratio, prices).cost == best


@settings(max_examples=60, deadline=None)
@given(demands, st.integers(0, 4), ratios)
def test_a_larger_budget_never_costs_more(seen, max_plans, ratio) -> None:
    prices = Prices(live=11)
    one_more = best_rungs(seen, max_plans + 1, ratio, prices)
    assert one_more.cost <= best_rungs(seen, max_plans, ratio, prices).cost


def test_of_equal_ladders_the_shortest() -> None:
    assert best_rungs([Demand(7, 0, 0), Demand(8, 5, 5)], 2, 0.5, Prices()).sizes == (8,)


def test_a_ladder_for_two_peaks() -> None:
    seen = [Demand(size, calls, calls) for size, calls in {7: 100, 8: 900, 60: 50, 64: 500, 500: 1}.items()]
    found = best_rungs(seen, 3, 0.5, Prices(live=1000))
    assert found.sizes == (8, 64, 500)
    assert found.padded_tokens == 100 * 1 + 50 * 4
    assert found.padding_waste == 300 / (8 * 1000 + 64 * 550 + 500)
    assert best_rungs(seen, 2, 0.5, Prices(live=1000)).live_calls == 1
    assert best_rungs(seen, 3, 0.5, Prices(live=1000, plan=300)).sizes == (8, 64, 500)
    assert best_rungs(seen, 3, 0.5, Prices(live=1000, plan=1001)).sizes == (8, 64)
    assert best_rungs([], 3, 0.5, Prices()).sizes == ()
