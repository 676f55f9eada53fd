"""What the counters of sizes add up to."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from graphcap.cudagraph.counters import stats as stats_module
from graphcap.cudagraph.counters.stats import RunnerStats
from graphcap.cudagraph.counters.traffic import Traffic, traffic_of
from graphcap.cudagraph.dispatch.ladder import Ladder

LADDER = Ladder([4, 8], 0.5)


def counted(*calls: int, names: tuple[str, ...] = ("num_tokens",)) -> RunnerStats:
    """A runner that replayed each of these sizes, those without a rung live."""
    stats = RunnerStats(dim_names=names)
    for n in calls:
        rung = LADDER.rung_of(n)
        counter = stats.of_size((n,), None if rung is None else (rung,))
        if rung is None:
            counter.live += 1
        else:
            counter.replays += 1
    return stats


def test_padding_hits_and_uncovered_sizes() -> None:
    traffic = traffic_of([counted(3, 3, 4, 5, 9, 9, 1)])
    assert traffic.histogram() == {(1,): 1, (3,): 2, (4,): 1, (5,): 1, (9,): 2}
    assert traffic.hits() == {(4,): 3, (8,): 1}
    assert traffic.uncovered() == {(9,): 2, (1,): 1}
    assert traffic.tokens == 3 + 3 + 4 + 5
    assert traffic.padded_tokens == 1 + 1 + 0 + 3
    assert traffic.padding_waste == 5 / 20


@settings(max_examples=60)
@given(st.lists(st.integers(1, 12)), st.lists(st.integers(1, 12)))
def test_two_runners_add_up(one, other) -> None:
    assert traffic_of([counted(*one), counted(*other)]) == traffic_of([counted(*one, *other)])


@settings(max_examples=60)
@given(st.lists(st.integers(1, 12)))
def test_nothing_is_lost(calls) -> None:
    traffic = traffic_of([counted(*calls)])
    assert sum(traffic.histogram().values()) == len(calls)
    assert sum(traffic.hits().values()) + sum(traffic.uncovered().values()) == len(calls)
    rungs = sum(rung[0] * hits for rung, hits in traffic.hits().items())
    assert traffic.tokens + traffic.padded_tokens == rungs
    assert 0 <= traffic.padding_waste <= LADDER.max_padding_ratio


def test_one_size_may_have_two_rungs() -> None:
    stats = RunnerStats(dim_names=("num_tokens",))
    stats.of_size((5,), (6,)).replays += 2  # as a uniform batch
    stats.of_size((5,), (8,)).replays += 1  # as a mixed one
    traffic = traffic_of([stats])
    assert traffic.histogram() == {(5,): 3}
    assert traffic.hits() == {(6,): 2, (8,): 1}
    assert traffic.padded_tokens == 2 * 1 + 3


def test_several_dims_are_counted_together() -> None:
    stats = RunnerStats(dim_names=("batch", "seq"))
    stats.of_size((3, 100), (4, 128)).replays += 1
    traffic = traffic_of([stats])
    assert (traffic.tokens, traffic.padded_tokens) == (300, 4 * 128 - 300)


def test_tokens_are_what_their_own_dim_counts() -> None:
    stats = RunnerStats(dim_names=("num_reqs", "num_tokens"))
    stats.of_size((3, 100), (4, 128)).replays += 2
    traffic = traffic_of([stats])
    assert (traffic.tokens, traffic.padded_tokens) == (200, 56)


def test_runners_of_other_dims_are_left_out() -> None:
    assert traffic_of([counted(3), counted(5, names=("batch",))]) == traffic_of([counted(3)])
    assert traffic_of([]) == Traffic()


def test_a_runner_without_dims_has_no_sizes() -> None:
    whole = RunnerStats()
    whole.of_size((), ()).replays += 5
    assert traffic_of([whole]) == Traffic()
    assert traffic_of([whole, counted(3)]) == traffic_of([counted(3)])
    assert Traffic().padding_waste == 0


def test_counters_do_not_fill_the_memory(monkeypatch) -> None:
    monkeypatch.setattr(stats_module, "_MAX_SIZES", 2)
    stats = counted(1, 2, 3, 3)
    assert [each.size for each in stats.sizes.values()] == [(1,), (2,)]
    stats.of_size((1,), None).live += 1
    assert stats.sizes[(1,), None].live == 2
