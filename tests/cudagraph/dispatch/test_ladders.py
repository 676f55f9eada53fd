"""Ladders of several dims: every dim looks up for itself, rungs are the product, settings say which is whose."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphcap.config import Config
from graphcap.cudagraph.dispatch.ladder import DEFAULT_SIZES, Ladder
from graphcap.cudagraph.dispatch.ladders import Ladders, ladders_of

sizes = st.lists(st.integers(1, 40), min_size=1, max_size=6)


def named(ladders: list[Ladder]) -> Ladders:
    names = [f"dim_{number}" for number in range(len(ladders))]
    return Ladders(names, ladders, names)


@settings(max_examples=100)
@given(st.lists(st.tuples(sizes, st.integers(1, 45)), min_size=1, max_size=4), st.floats(0, 1, exclude_max=True))
def test_each_dim_is_looked_up_for_itself(dims, ratio) -> None:
    ladders = [Ladder(each, ratio) for each, _ in dims]
    wanted = tuple(n for _, n in dims)
    alone = tuple(ladder.rung_of(n) for ladder, n in zip(ladders, wanted, strict=True))
    both = named(ladders)
    assert both.rung_of(wanted) == (None if None in alone else alone)
    assert bool(both.why_uncovered(wanted)) == (None in alone)


@settings(max_examples=100)
@given(st.lists(sizes, min_size=1, max_size=3), st.integers(1, 60))
def test_rungs_are_the_smallest_of_the_product_largest_first(dims, max_plans) -> None:
    ladders = named([Ladder(each, 0.5) for each in dims])
    product = sorted(itertools.product(*map(set, dims)), key=lambda rung: (math.prod(rung), rung))
    assert ladders.num_rungs == len(product)
    assert ladders.rungs(max_plans) == product[:max_plans][::-1]
    assert all(ladders.is_declared(rung) for rung in product)


def test_a_few_rungs_of_an_enormous_product() -> None:
    ladders = named([Ladder(DEFAULT_SIZES, 0.5)] * 6)
    assert ladders.num_rungs == 51**6
    assert ladders.rungs(2) == [(1, 1, 1, 1, 1, 2), (1, 1, 1, 1, 1, 1)]


def test_a_dim_that_may_not_be_padded_keeps_its_size() -> None:
    ladders = ladders_of(["batch", "seq"], {"batch"}, Config(capture_sizes={"batch": (4, 8), "seq": (128,)}))
    assert ladders.rung_of((3, 100)) == (4, 100)
    assert not ladders.is_declared((4, 100))
    assert ladders.is_declared((4, 128))
    assert ladders.rung_of((9, 128)) is None
    assert ladders.why_uncovered((9, 128)) == "batch: above the ladder, which ends at 8"


def test_a_dim_without_sizes_has_no_rungs_to_capture_ahead() -> None:
    ladders = ladders_of(["batch", "seq"], {"batch", "seq"}, Config(capture_sizes={"batch": (4, 8)}))
    assert ladders.rung_of((3, 100)) == (4, 100)
    assert ladders.num_rungs == 0
    assert ladders.rungs(10) == []


def test_a_region_without_dims() -> None:
    ladders = ladders_of([], [], Config(capture_sizes=(4, 8)))
    assert ladders.rung_of(()) == ()
    assert ladders.rungs(10) == []
    assert not ladders.is_declared(())
    assert ladders.notes == ()


def test_no_setting_means_the_default_ladder_where_sizes_may_be_padded() -> None:
    ladders = ladders_of(["num_tokens", "s7"], {"num_tokens"}, Config())
    assert ladders.ladders == (Ladder(DEFAULT_SIZES, 0.5), None)
    assert ladders.rung_of((9, 9)) == (16, 9)


@pytest.mark.parametrize("names", [["s7"], ["num_tokens"], ["seq", "num_tokens"]])
def test_a_list_is_for_the_tokens_or_the_only_dim(names: list[str]) -> None:
    ladders = ladders_of(names, names, Config(capture_sizes=[4, 8]))
    assert ladders.ladders[-1] == Ladder([4, 8], 0.5)
    assert ladders.ladders[:-1] == (None,) * (len(names) - 1)
    assert ladders.notes == ()


def test_settings_that_fit_no_dim_are_noted() -> None:
    assert ladders_of(["a", "b"], [], Config(capture_sizes=[4])).notes == (
        "capture_sizes is a list, and of the dims a, b none is 'num_tokens': use a mapping",
    )
    assert ladders_of(["batch"], [], Config(capture_sizes={"bach": [4]})).notes == (
        "capture_sizes names 'bach'; the dims here are batch",
    )


def test_the_maximum_holds_for_every_dim() -> None:
    config = Config(capture_sizes={"batch": (4, 8, 16)}, max_capture_size=8)
    ladders = ladders_of(["batch", "seq"], {"batch"}, config)
    assert ladders.rung_of((7, 8)) == (8, 8)
    assert ladders.rung_of((9, 8)) is None
    assert ladders.rung_of((7, 9)) is None
    assert ladders.why_uncovered((7, 9)) == "seq above max_capture_size=8"
    assert ladders.notes == ("capture_sizes of batch: 16 above max_capture_size=8, never captured",)
