"""A ladder finds the smallest rung that holds a batch, never pads more than allowed, and says why it has none."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphcap.cudagraph.dispatch.ladder import DEFAULT_SIZES, Ladder, default_sizes, requests_ladder
from graphcap.errors import ConfigError

sizes = st.lists(st.integers(1, 300), max_size=12)
ratios = st.floats(0, 1, exclude_max=True)


@settings(max_examples=150)
@given(sizes, ratios, st.integers(-3, 320))
def test_it_is_the_smallest_rung_that_holds_the_batch_and_pads_no_more_than_allowed(sizes, ratio, n) -> None:
    holding = [rung for rung in sizes if n > 0 and rung >= n]
    allowed = bool(holding) and (min(holding) - n) / min(holding) <= ratio
    assert Ladder(sizes, ratio).rung_of(n) == (min(holding) if allowed else None)


@settings(max_examples=100)
@given(sizes, ratios)
def test_larger_batches_have_no_smaller_rungs_and_a_rung_is_its_own(sizes, ratio) -> None:
    ladder = Ladder(sizes, ratio)
    found = [rung for rung in map(ladder.rung_of, range(ladder.largest + 2)) if rung is not None]
    assert found == sorted(found)
    assert all(ladder.rung_of(rung) == rung and rung in ladder for rung in sizes)
    assert set(found) == set(ladder.sizes)


def test_sizes_beyond_the_table_are_found_as_well() -> None:
    ladder = Ladder([8, 100_000, 10**9], 0.5)
    assert ladder.rung_of(65_536) == ladder.rung_of(50_000) == 100_000
    assert ladder.rung_of(100_001) is None
    assert ladder.rung_of(6 * 10**8) == 10**9
    assert ladder.rung_of(10**9 + 1) is None


def test_why_a_size_is_uncovered() -> None:
    ladder = Ladder([4, 32], 0.5)
    assert ladder.why_uncovered(4) == ""
    assert ladder.why_uncovered(5) == "more padding than max_padding_ratio=0.5"
    assert ladder.why_uncovered(33) == "above the ladder, which ends at 32"
    assert Ladder([], 0.5).rung_of(1) is None


def test_what_is_no_ladder() -> None:
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        Ladder([0, 4], 0.5)
    with pytest.raises(ConfigError, match="max_padding_ratio"):
        Ladder([4], 1.0)


def test_default_sizes() -> None:
    assert default_sizes() == (1, 2, 4, *range(8, 256, 8), 256, *range(272, 512, 16), 512)
    assert len(DEFAULT_SIZES) == 51
    assert default_sizes(20) == (1, 2, 4, 8, 16, 20)
    assert default_sizes(16) == (1, 2, 4, 8, 16)
    assert default_sizes(1) == (1,)
    assert default_sizes(4096) == DEFAULT_SIZES


@pytest.mark.parametrize("maximum", [1, 3, 7, 100, 511, 512])
def test_default_ladder_serves_every_size_up_to_its_maximum(maximum: int) -> None:
    ladder = Ladder(default_sizes(maximum), 0.5)
    assert [n for n in range(1, maximum + 1) if ladder.rung_of(n) is None] == []
    assert ladder.largest == maximum


@settings(max_examples=150)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=12), st.integers(1, 9), st.none() | st.integers(1, 80))
def test_requests_ladder_stays_within_the_tokens_and_the_requests(sizes, query_len, max_num_reqs) -> None:
    tokens = Ladder(sizes, 0.9)
    requests = requests_ladder(tokens, query_len, max_num_reqs)
    reach = min(tokens.largest // query_len, max_num_reqs or 10**6)
    assert requests.largest == reach
    assert len(requests.sizes) <= len(tokens.sizes) + 1
    for count in range(1, reach + 1):  # no more requests than the token ladder would have had tokens for
        whole = tokens.sizes[next(i for i, size in enumerate(tokens.sizes) if size >= count * query_len)]
        assert min(rung for rung in requests.sizes if rung >= count) <= -(-whole // query_len)


def test_requests_ladder_of_one_token_is_the_token_ladder() -> None:
    tokens = Ladder(default_sizes(), 0.5)
    assert requests_ladder(tokens, 1) == tokens
    assert requests_ladder(tokens, 1, 100).sizes == (*(n for n in tokens.sizes if n < 100), 100)


def test_requests_ladder_of_speculative_decoding() -> None:
    assert requests_ladder(Ladder([1, 2, 4, 8, 16, 24], 0.5), 3, 5).sizes == (1, 2, 3, 5)
    assert requests_ladder(Ladder([1, 2], 0.5), 3).sizes == ()
    with pytest.raises(ConfigError, match="at least one token"):
        requests_ladder(Ladder([8], 0.5), 0)
    with pytest.raises(ConfigError, match="max_num_reqs"):
        requests_ladder(Ladder([8], 0.5), 1, 0)
