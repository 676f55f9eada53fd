"""What is worth a warning, and that it is given once."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator

import pytest

from graphcap.cudagraph.counters.alerts import alerts, forget_warnings, warn_once
from graphcap.cudagraph.counters.stats import RunnerStats


@pytest.fixture(autouse=True)
def _nothing_given() -> Iterator[None]:
    forget_warnings()
    yield
    forget_warnings()


def replayed(size: int, rung: int | None, replays: int = 0, live: int = 0) -> RunnerStats:
    stats = RunnerStats(dim_names=("num_tokens",), retired_replays=replays)
    counter = stats.of_size((size,), None if rung is None else (rung,))
    counter.replays, counter.live = replays, live
    return stats


def causes(stats: RunnerStats) -> list[str]:
    return [alert.cause for alert in alerts(stats)]


def test_nothing_to_say() -> None:
    assert causes(RunnerStats()) == []
    assert causes(replayed(8, 8, replays=1000)) == []


@pytest.mark.parametrize(("live", "replays", "given"), [(60, 40, True), (50, 50, False), (60, 39, False)])
def test_most_calls_ran_live(live: int, replays: int, given: bool) -> None:
    stats = RunnerStats(
        live_calls=Counter({"max_plans=1 reached": live - 9, "odd strides": 9}), retired_replays=replays
    )
    assert causes(stats) == (["live"] if given else [])
    if given:
        assert "60 of 100 calls" in alerts(stats)[0].message
        assert "51 of them for this reason: max_plans=1 reached" in alerts(stats)[0].message


@pytest.mark.parametrize("reason", ["cudagraph_mode=NONE", "max_mode=NONE", "dispatched to run without a graph"])
def test_what_was_asked_for_is_no_reason(reason: str) -> None:
    assert causes(RunnerStats(live_calls=Counter({reason: 1000}))) == []
    assert causes(RunnerStats(live_calls=Counter({reason: 1000, "odd strides": 101}))) == ["live"]


def test_numbers_that_are_others_in_every_call() -> None:
    stats = RunnerStats(live_calls=Counter({"warm-up": 60}), retired_replays=40)
    assert causes(stats) == ["first"]
    assert "60 of 100 calls were the first with their sizes and numbers" in alerts(stats)[0].message
    assert causes(RunnerStats(live_calls=Counter({"warm-up": 50}), retired_replays=50)) == []


def test_sizes_that_no_rung_serves() -> None:
    stats = replayed(8, 8, replays=94)
    stats.of_size((700,), None).live = 4
    stats.of_size((600,), None).live = 2
    (alert,) = alerts(stats)
    assert alert.cause == "uncovered"
    assert "6 of 100 calls had one of 2 sizes" in alert.message
    assert "num_tokens=700 (4 calls)" in alert.message
    stats.of_size((8,), (8,)).replays = 114
    assert causes(stats) == []


def test_much_padding() -> None:
    assert causes(replayed(5, 8, replays=100)) == ["padding"]
    assert "38%" in alerts(replayed(5, 8, replays=100))[0].message
    assert causes(replayed(6, 8, replays=100)) == []
    assert causes(replayed(5, 8, replays=99)) == []


def test_addresses_that_keep_moving() -> None:
    stats = RunnerStats(recaptures=9, moves=Counter({"lora_a": 7, "lora_b": 2}))
    (alert,) = alerts(stats)
    assert alert.cause == "recaptures"
    assert "lora_a (7 times)" in alert.message
    assert causes(RunnerStats(recaptures=8)) == []
    assert causes(RunnerStats(recaptures=9)) == ["recaptures"]


def test_each_warning_is_given_once_for_each_region(caplog: pytest.LogCaptureFixture) -> None:
    def given() -> int:
        caplog.clear()
        warn_once("forward_0", RunnerStats(recaptures=9))
        warn_once("forward_0", RunnerStats(recaptures=10))
        warn_once("forward_1", RunnerStats(recaptures=9))
        assert {record.name for record in caplog.records} <= {"graphcap.cudagraph"}
        return len(caplog.records)

    with caplog.at_level(logging.WARNING, logger="graphcap"):
        assert given() == 2
        assert given() == 0
        forget_warnings()
        assert given() == 2
