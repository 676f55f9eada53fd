"""A runner counts each call at its size and its rung, and warns of what its counters show."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from graphcap.config import CUDAGraphMode
from graphcap.cudagraph import Dispatch, GraphKey, InputKind, InputSpec, Program, Size, Step, step
from graphcap.cudagraph.counters.alerts import forget_warnings
from graphcap.cudagraph.counters.stats import RunnerStats
from graphcap.cudagraph.counters.traffic import traffic_of
from graphcap.cudagraph.runner import GraphRunner
from tests.cudagraph.dispatch.test_routes import serving_program
from tests.cudagraph.regions import randn, runner_of


@pytest.fixture(autouse=True)
def _nothing_given() -> Iterator[None]:
    forget_warnings()
    yield
    forget_warnings()


def rows_program() -> Program:
    """Doubles each of its tokens."""
    inputs = (
        InputSpec("x", InputKind.TENSOR, sizes=(Size("t"), 4), dim_names={0: "num_tokens"}),
        InputSpec("t", InputKind.SCALAR, symbol="t", in_key=True),
    )
    steps = (Step("piece_0", lambda x: (x * 2,), (0,), (2,), symbols=frozenset("t")),)
    return Program("rows", inputs, steps, (2,), lambda x, t: (x * 2,), ((Size("t"), 4),))


def call(runner: GraphRunner, *sizes: int) -> None:
    for size in sizes:
        x = randn(size, 4)
        (out,) = runner(x, size)
        assert torch.equal(out, x * 2)


def test_every_call_is_counted_at_its_size() -> None:
    """Field notes row 31: no statistics."""
    runner = runner_of(rows_program(), capture_sizes=[4, 8], max_capture_size=8)
    call(runner, 4, 4, 4, 4, 8, 8, 8, 9, 9)
    traffic = traffic_of([runner.stats])
    assert traffic.names == ("num_tokens",)
    assert traffic.hits() == {(4,): 2, (8,): 1} == {plan.key: plan.replays for plan in runner.stats.plans}
    assert (traffic.tokens, traffic.padded_tokens) == (4 + 4 + 8, 0)
    assert traffic.uncovered() == {(9,): 2}
    assert sum(each.live for each in traffic.seen) == runner.stats.live_calls.total() == 4
    assert sum(traffic.histogram().values()) + runner.stats.captures == 9


def test_sizes_that_a_plan_does_not_depend_on_are_counted_as_they_are() -> None:
    runner = runner_of(serving_program(), cudagraph_mode="PIECEWISE", capture_sizes={"num_tokens": [6]})
    for reqs in (2, 2, 2, 3, 3):
        runner(randn(6, 4), torch.ones(reqs), 6, reqs)
    traffic = traffic_of([runner.stats])
    assert traffic.hits() == {(6, 2): 1, (6, 3): 2}
    assert (traffic.tokens, traffic.padded_tokens) == (18, 0), "requests are no tokens"


def test_a_runner_that_mostly_runs_live_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    runner = runner_of(rows_program(), capture_sizes=[4], max_capture_size=4)
    with caplog.at_level(logging.WARNING, logger="graphcap"):
        call(runner, *[9] * 127)
        assert caplog.messages == []
        call(runner, 9)
        assert len(caplog.messages) == 2
        assert "128 of 128 calls ran without a graph" in caplog.messages[0]
        assert "most often num_tokens=9 (128 calls)" in caplog.messages[1]
        call(runner, *[9] * 300)
        assert len(caplog.messages) == 2


def test_addresses_that_keep_moving_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    runner = runner_of(rows_program(), capture_sizes=[4])
    runner.stats.recaptures = 9
    with caplog.at_level(logging.WARNING, logger="graphcap"):
        call(runner, 4, 4)
    assert len(caplog.messages) == 1
    assert "captured again 9 times" in caplog.messages[0]


def test_calls_that_were_asked_to_run_live_are_no_alarm(caplog: pytest.LogCaptureFixture) -> None:
    runner = runner_of(serving_program(), cudagraph_mode="FULL_DECODE_ONLY")
    decided = step(dispatch=Dispatch(CUDAGraphMode.NONE, 6, 6, GraphKey(6, 6, 1)))
    x, lens = randn(6, 4), torch.ones(6)
    with caplog.at_level(logging.WARNING, logger="graphcap"):
        for said in (step(num_tokens=6, num_reqs=2), step(num_tokens=6, max_mode="NONE"), decided):
            with said:
                for _ in range(200):
                    runner(x, lens, 6, 6)
    assert runner.stats.live_calls.total() == 600
    assert caplog.messages == []


def test_what_is_gone_is_counted_on() -> None:
    """Replays of plans that went, sizes and reasons; not the plans."""
    first, second = (runner_of(rows_program(), capture_sizes=[4], capture_after=2, max_padding_ratio=0.9) for _ in "ab")
    call(first, 4, 4, 4, 3, 3, 9)
    call(second, 4, 4, 4)
    total = RunnerStats()
    total.absorb(first.stats)
    total.absorb(second.stats)
    assert total.plans == []
    assert total.captures == first.stats.captures + second.stats.captures > 0
    assert total.replays == first.stats.replays + second.stats.replays > 0
    assert total.live_calls.total() == first.stats.live_calls.total() + second.stats.live_calls.total()
    assert traffic_of([total]) == traffic_of([first.stats, second.stats])
    assert traffic_of([total]).histogram() == {(3,): 2, (4,): 4, (9,): 1}, "calls that captured are in neither"
