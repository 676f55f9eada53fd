"""The launch-cost model keeps its laws, and agrees with measured steps as well as its document says."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphcap.cudagraph.counters.cost import StepCost, StepTime, crossover, over_batches, worth_a_graph
from tests.cudagraph import measured_steps as measured

DOCUMENT = (Path(__file__).parents[3] / "docs" / "cost-model.md").read_text()

counts = st.integers(1, 2000)
times = st.floats(0, 1e5)
costs = st.builds(
    StepCost, launches=counts, launch_us=times, gpu_us=times, kernels=counts, segments=counts, live_us=times,
    replay_us=times, fixed_us=times, gap_us=times, boundary_us=times,
)  # fmt: skip


@settings(max_examples=60)
@given(costs)
def test_a_step_is_as_slow_as_its_slower_clock(cost) -> None:
    for time in (cost.without_graphs(), cost.piecewise(), cost.full()):
        assert time.us == max(time.host_us, time.gpu_us)
        assert (time.bound == "host") == (time.us != time.gpu_us)
    assert cost.full().us <= cost.piecewise().us


@settings(max_examples=60)
@given(costs)
def test_one_segment_without_live_parts_is_full(cost) -> None:
    assert dataclasses.replace(cost, segments=1, live_us=0.0).piecewise() == cost.full()


def test_what_each_clock_is_made_of() -> None:
    cost = StepCost(
        launches=100, launch_us=9, gpu_us=500, kernels=50, segments=4, live_us=30, replay_us=7, fixed_us=20, gap_us=2,
        boundary_us=10,
    )  # fmt: skip
    assert cost.without_graphs() == StepTime(900, 500)
    assert cost.piecewise() == StepTime(20 + 4 * 7 + 30, 500 + 50 * 2 + 3 * 10)
    assert cost.full() == StepTime(27, 600)
    assert str(cost) == "no graphs 900 us (host-bound); PIECEWISE 630 us (GPU-bound); FULL 600 us (GPU-bound)"


def test_crossover_is_where_the_gpu_has_more_to_do_than_the_host() -> None:
    cost = StepCost(launches=100, launch_us=10, gpu_us=0, kernels=0, replay_us=0, gap_us=0)
    at = over_batches(cost, (1, 10.0), (11, 110.0))
    assert at(5).gpu_us == 50
    assert crossover(at, range(1, 200)) == 96  # saves 1000 - 960, less than a twentieth
    assert crossover(at, range(1, 200), least_gain=0.5) == 51
    assert crossover(at, range(1, 50)) is None
    assert crossover(at, []) is None
    with pytest.raises(ValueError, match="got 1 twice"):
        over_batches(cost, (1, 10.0), (1, 20.0))


def test_crossover_is_not_a_batch_after_which_graphs_pay_again() -> None:
    gpu = {1: 1000, 2: 100, 3: 1000, 4: 1000}
    cost = StepCost(launches=100, launch_us=10, gpu_us=0, kernels=0, replay_us=0, gap_us=0)
    assert crossover(lambda batch: dataclasses.replace(cost, gpu_us=gpu[batch]), gpu) == 3


def test_a_segment_is_worth_a_graph_unless_live_is_clearly_faster() -> None:
    replay = StepTime(10.0, 12.0)
    assert worth_a_graph(StepTime(30.0, 30.0), replay)
    assert worth_a_graph(StepTime(10.0, 10.0), replay)
    assert worth_a_graph(StepTime(8.1, 8.0), replay)
    assert not worth_a_graph(StepTime(8.0, 12.0), replay)
    assert worth_a_graph(StepTime(9.0, 9.0), replay)
    assert not worth_a_graph(StepTime(9.0, 9.0), replay, least_gain=0.1)


def test_a_segment_whose_work_the_gpu_does_later_without_a_graph_is_worth_one() -> None:
    assert worth_a_graph(StepTime(3.0, 20.0), StepTime(10.0, 12.0))


@pytest.mark.parametrize("unknown", [StepTime(math.nan, 1.0), StepTime(1.0, math.nan)])
def test_a_time_that_could_not_be_measured_gives_up_no_graph(unknown) -> None:
    assert worth_a_graph(unknown, StepTime(10.0, 10.0))
    assert worth_a_graph(StepTime(1.0, 1.0), unknown)


# -- against measured steps --------------------------------------------------------------------------------------------

ROWS = [*measured.MEASURED.items(), *measured.OTHER_RUN.items()]


@pytest.mark.parametrize(("where", "row"), ROWS)
def test_the_modes_come_in_the_measured_order(where, row) -> None:
    predicted = measured.predicted(*where)
    both = [pair for pair in zip(predicted, row, strict=True) if None not in pair]
    assert sorted(both, key=lambda pair: pair[0]) == sorted(both, key=lambda pair: pair[1])


@pytest.mark.parametrize(("where", "row"), ROWS)
def test_graphs_are_predicted_within_three_percent_launches_within_twenty_six(where, row) -> None:
    predicted = measured.predicted(*where)
    for name, tolerance in {"eager": 1.26, "compiled": 1.26, "piecewise": 1.03, "full": 1.03}.items():
        true, found = getattr(row, name), getattr(predicted, name)
        if true is not None:
            assert max(true / found, found / true) < tolerance, name


@pytest.mark.parametrize(("where", "host_us"), measured.PIECEWISE_HOST_US.items())
def test_the_host_of_piecewise_within_sixteen_percent(where, host_us) -> None:
    found = measured.eager_step(*where).piecewise().host_us
    assert max(found / host_us, host_us / found) < 1.16


def test_the_document_shows_these_numbers() -> None:
    written = re.findall(r"^\| (0\.6b|8b), (1|64) \| ([\w.]+) \| (\d+) \| (\d+) \| ([\d-]+) \|", DOCUMENT, re.MULTILINE)
    rows = {(model, int(batch), mode): tuple(rest) for model, batch, mode, *rest in written}
    assert rows == {
        (*where, name): (
            f"{getattr(measured.predicted(*where), name):.0f}",
            str(getattr(row, name)),
            str(getattr(measured.OTHER_RUN[where], name) or "-"),
        )
        for where, row in measured.MEASURED.items()
        for name in row._fields
    }


@pytest.mark.parametrize(("name", "step"), [("eager", measured.eager_step), ("compiled", measured.compiled_step)])
def test_the_document_says_where_graphs_stop_to_matter(name, step) -> None:
    busy = measured.BUSY_US
    at = over_batches(step("0.6b", 1), (1, busy["0.6b", 1]), (64, busy["0.6b", 64]))
    assert f"{crossover(at, range(1, 4097))} ({name})" in DOCUMENT


def test_the_example_of_the_document_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT, re.S)
    (said,) = re.findall(r"print\(step\)  # (.*)", code)
    exec(code, {})
    assert capsys.readouterr().out.strip() == said
