"""Segments that are too small to be worth a graph: what is measured, what becomes of it, and that nobody notices.

Row 24 of the field notes: a mode that was chosen automatically must not be slower than none.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphcap.cudagraph import Capture
from graphcap.cudagraph.counters.cost import StepTime
from graphcap.cudagraph.dispatch.key import GraphKey
from graphcap.cudagraph.dispatch.step import step
from tests.cudagraph.clocks import Clock, timed_device
from tests.cudagraph.padded_regions import N, PaddedRegion
from tests.cudagraph.regions import LIVE, Region, randn, runner_of, warm
from tests.cudagraph.test_random_programs import arguments, copies, programs

REASON = "a graph would not pay: 2.0 us live, 8.0 us replayed"


def small_in_the_middle(clock, small_us=2.0):
    """A large piece, attention, a small piece that adds to a counter, attention, a large piece."""
    region = Region()
    count, x = region.static("count"), region.tensor("x")
    a = region.step(clock.taking(50.0, lambda x: x + 1), x)
    b = region.step(lambda a: a * 2, a, capture=LIVE)
    c = region.step(clock.taking(small_us, lambda n, b: b + n.add_(1)), count, b, mutates=[count])
    d = region.step(lambda c: c * 3, c, capture=LIVE)
    return region.returning(region.step(clock.taking(50.0, lambda d: d - 4), d), c)


def against_live(runner, program, calls=6, size=3):
    count, expected_count = torch.zeros(size), torch.zeros(size)
    for _ in range(calls):
        x = randn(size)
        expected = program.run(expected_count, x)
        assert all(map(torch.equal, runner(count, x), expected))
        assert torch.equal(count, expected_count)


def test_a_small_segment_runs_live_and_the_report_says_why():
    clock = Clock()
    program = small_in_the_middle(clock)
    runner = runner_of(program, timed_device(clock))
    against_live(runner, program)
    (plan,) = runner.stats.plans
    assert plan.live["step_2"] == REASON
    assert plan.captured == ["step_0", "step_4"]
    assert plan.num_segments == 2
    assert plan.replays == 6 - 4  # two warm-ups, the capture that measured, and the capture that counts
    assert (runner.stats.captures, runner.stats.evictions) == (1, 0)
    assert not runner.stats.failures


@pytest.mark.parametrize("small_us", [6.5, 8.0, 30.0])
def test_a_segment_that_is_not_clearly_faster_live_stays_a_graph(small_us):
    clock = Clock()
    program = small_in_the_middle(clock, small_us)
    runner = runner_of(program, timed_device(clock))
    against_live(runner, program)
    assert runner.stats.plans[0].num_segments == 3
    assert runner.stats.plans[0].replays == 6 - 3


def test_what_is_not_small_is_run_once_and_no_more():
    clock = Clock()
    program = small_in_the_middle(clock, 1000.0)
    runner = runner_of(program, timed_device(clock))
    against_live(runner, program)
    assert clock.measured.count(1000.0) == 1
    assert runner.stats.plans[0].num_segments == 3


def test_no_time_is_taken_on_a_device_whose_times_say_nothing():
    clock = Clock()
    program = small_in_the_middle(clock)
    runner = runner_of(program)
    against_live(runner, program)
    assert clock.measured == []
    assert runner.stats.plans[0].num_segments == 3


def test_one_measurement_serves_all_sizes_of_a_family():
    clock = Clock()
    program = small_in_the_middle(clock)
    runner = runner_of(program, timed_device(clock))
    against_live(runner, program)
    clock.measured.clear()
    region = PaddedRegion()
    x = region.rows("x", 3)
    y = region.step(clock.taking(2.0, lambda x: x + 1), x)
    z = region.step(clock.taking(2.0, lambda y: y * 2), y, capture=LIVE)
    rows = runner_of(
        region.program(region.step(clock.taking(50.0, lambda z: z - 1), z), sizes=[(N, 3)]),
        timed_device(clock),
        capture_sizes=[4, 8],
    )
    for n in (8, 8, 8):
        rows(n, randn(n, 3))
    measured = len(clock.measured)
    assert measured > 0
    for n in (8, 4, 4, 4, 3, 3, 3, 7, 7):
        x = randn(n, 3)
        assert torch.equal(rows(n, x)[0], (x + 1) * 2 - 1)
    assert len(clock.measured) == measured
    assert [list(plan.live) for plan in rows.stats.plans] == [["step_0", "step_1"]] * 2
    assert rows.stats.replays >= 5


def test_another_kind_of_batch_is_measured_by_itself():
    clock = Clock()
    region = Region()
    x = region.tensor("x")
    y = region.step(clock.taking(2.0, lambda x: x + 1), x, capture=Capture.UNIFORM)
    z = region.step(clock.taking(50.0, lambda y: y * 2), region.step(lambda y: y, y, capture=LIVE))
    runner = runner_of(region.returning(z), timed_device(clock), cudagraph_mode="FULL")
    for _ in range(4):
        runner(randn(3))
    before = len(clock.measured)
    for _ in range(4):
        with step(key=GraphKey(3, 3, 1)):
            runner(randn(3))
    assert len(clock.measured) > before


def test_a_region_that_is_faster_live_as_a_whole_gets_no_graph():
    clock = Clock()
    region = Region()
    x = region.tensor("x")
    program = region.returning(region.step(clock.taking(2.0, lambda x: x + 1), x))
    runner = runner_of(program, timed_device(clock), cudagraph_mode="FULL")
    for _ in range(5):
        x = randn(3)
        assert torch.equal(runner(x)[0], x + 1)
    assert not runner.stats.plans
    assert runner.stats.live_calls[f"nothing to capture: {REASON}"] == 2


def test_several_small_segments_have_one_reason():
    clock = Clock()
    region = Region()
    slot = region.tensor("x")
    for us in (2.0, 3.0, 50.0):
        slot = region.step(clock.taking(us, lambda x: x + 1), slot)
        slot = region.step(lambda x: x * 2, slot, capture=LIVE)
    runner = runner_of(region.returning(slot), timed_device(clock))
    warm(runner, randn(3), calls=4)
    live = runner.stats.plans[0].live
    assert live["step_0"] == live["step_2"] == "a graph would not pay: 2.0 to 3.0 us live, 8.0 us replayed"
    assert "step_4" not in live


def test_a_segment_that_would_pull_others_along_stays_a_graph():
    """The large piece writes into what the small one made: it can only be captured if the small one is."""
    clock = Clock()
    region = Region()
    x = region.tensor("x")
    y = region.step(clock.taking(2.0, lambda x: x + 1), x)
    z = region.step(lambda y: y * 2, y, capture=LIVE)
    w = region.step(clock.taking(50.0, lambda y, z: y.mul_(2) + z), y, z, mutates=[y])
    runner = runner_of(region.returning(w), timed_device(clock))
    for _ in range(5):
        x = randn(3)
        assert torch.equal(runner(x)[0], (x + 1) * 4)
    assert list(runner.stats.plans[0].live) == ["step_1"]


def test_results_that_have_to_be_bridged_count(monkeypatch):
    copied = []
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda value: copied.append(value.shape) or empty_like(value))
    clock = Clock()
    region = Region()
    x = region.tensor("x")
    y, unread = region.step(clock.taking(2.0, lambda x: (x + 1, x[:1] + 2)), x, writes=2)
    z = region.step(lambda y: y * 2, y, capture=LIVE)
    runner = runner_of(
        region.returning(region.step(clock.taking(50.0, lambda y, z: y + z), y, z), unread), timed_device(clock)
    )
    warm(runner, randn(3), calls=4)
    assert copied == [(3,)]
    assert list(runner.stats.plans[0].live) == ["step_0", "step_1"]


@pytest.mark.parametrize("settings", [{"verify": True}, {"verify": 1}], ids=["always", "once"])
def test_segments_that_were_cut_for_an_inspection_say_nothing(settings):
    clock = Clock()
    program = small_in_the_middle(clock)
    runner = runner_of(program, timed_device(clock), **settings)
    against_live(runner, program, calls=3)
    assert clock.measured == []
    against_live(runner, program, calls=8)
    assert bool(clock.measured) == (settings["verify"] is not True)


def test_what_is_captured_on_trust_is_not_run_for_a_measurement():
    clock = Clock()
    program = small_in_the_middle(clock)
    steps = [dataclasses.replace(each, unproven=("ns::op",) * (each.name == "step_2")) for each in program.steps]
    runner = runner_of(dataclasses.replace(program, steps=tuple(steps)), timed_device(clock))
    against_live(runner, program)
    assert 2.0 not in clock.measured
    assert 50.0 in clock.measured


def test_what_a_replay_overwrites_of_its_own_inputs_is_there_for_the_next():
    """The result of the first segment ends its life within the second, which may use its memory again."""
    clock = Clock()
    region = Region()
    x = region.tensor("x")
    a = region.step(clock.taking(50.0, lambda x: x + 1), x)
    b = region.step(lambda a: a * 2, a, capture=LIVE)
    c = region.step(clock.taking(50.0, lambda a, b: a + b), a, b)
    runner = runner_of(region.returning(region.step(lambda c: c * 2, c)), timed_device(clock))
    for _ in range(5):
        x = randn(3)
        assert torch.equal(runner(x)[0], ((x + 1) + (x + 1) * 2) * 2)
    assert clock.measured.count(50.0) == 2 * (1 + 5)


def test_random_numbers_are_drawn_once():
    clock = Clock()
    region = Region()
    x = region.tensor("x")
    y = region.step(clock.taking(2.0, lambda x: x + torch.rand(3)), x)
    z = region.step(lambda y: y * 2, y, capture=LIVE)
    program = region.returning(region.step(clock.taking(50.0, lambda z: z + torch.rand(3)), z))
    runner = runner_of(program, timed_device(clock))
    torch.manual_seed(0)
    got = [runner(torch.zeros(3))[0] for _ in range(6)]
    torch.manual_seed(0)
    assert all(map(torch.equal, got, [program.run(torch.zeros(3))[0] for _ in range(6)]))


def test_a_measurement_that_fails_leaves_the_capture_alone():
    calls = []

    def broken(call):
        calls.append(call)
        call()
        raise ZeroDivisionError("the clock")

    program = small_in_the_middle(Clock())
    runner = runner_of(program, timed_device(broken))
    against_live(runner, program)
    assert len(calls) == 3, "one for each segment"
    assert runner.stats.plans[0].num_segments == 3
    assert not runner.stats.failures


def test_processes_that_work_together_do_not_measure(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    clock = Clock()
    program = small_in_the_middle(clock)
    runner = runner_of(program, timed_device(clock))
    against_live(runner, program)
    assert clock.measured == []


@settings(max_examples=60)
@given(
    program=programs(),
    mode=st.sampled_from(["PIECEWISE", "FULL"]),
    outputs=st.sampled_from(["clone", "static", "ring:1"]),
    seed=st.integers(0, 99),
)
def test_any_program_is_what_it_is_live_while_it_is_measured(program, mode, outputs, seed):
    """Whatever the clock says, values and effects are those of the live program in every call."""
    draw = torch.Generator().manual_seed(seed)

    def clock(call):
        call()
        return StepTime(float(torch.rand(1, generator=draw)), 1.0)

    runner = runner_of(program, timed_device(clock), cudagraph_mode=mode, outputs=outputs)
    weight = torch.ones(5)
    for call in range(6):
        args = arguments(call, "apart", weight)
        theirs = copies(args)
        expected, got = program.run(*theirs), runner(*args)
        for mine, other in zip((*got, *args), (*expected, *theirs), strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=0)
    assert not runner.stats.failures


@pytest.mark.gpu
def test_real_segments_are_measured_and_effects_happen_once():
    from graphcap.cudagraph.hardware.cuda import CudaDevice

    region = Region()
    count, x = region.static("count"), region.tensor("x")
    a = region.step(lambda x: torch.nn.functional.dropout(x + 1, 0.5), x)
    b = region.step(lambda a: a * 2, a, capture=LIVE)
    c = region.step(lambda n, b: b + n.add_(1), count, b, mutates=[count])
    d = region.step(lambda c: c * 3, c, capture=LIVE)
    program = region.returning(region.step(lambda d: d - torch.rand(64, device="cuda"), d), c)
    device, measured = CudaDevice(0), []
    stopwatch = device.stopwatch
    device.stopwatch = lambda call: measured.append(stopwatch(call)) or measured[-1]
    runner = runner_of(program, device)
    inputs = [torch.randn(64, device="cuda") for _ in range(6)]
    torch.cuda.manual_seed(0)
    count = torch.zeros(64, device="cuda")
    got = [runner(count, x) for x in inputs]
    torch.cuda.manual_seed(0)
    count = torch.zeros(64, device="cuda")
    for mine, x in zip(got, inputs, strict=True):
        for one, other in zip(mine, program.run(count, x), strict=True):
            torch.testing.assert_close(one, other)
    assert len(measured) == 3 * (1 + 5 + 5)
    assert all(each.host_us > 0 and each.gpu_us > 0 for each in measured)
    assert not runner.stats.failures


def test_segments_that_call_the_same_functions_are_measured_once():
    clock = Clock()
    layer = clock.taking(2.0, lambda x: (x + 1,))

    def layers(num_layers):
        region = Region()
        x = region.tensor("x")
        for _ in range(num_layers):
            x = region.step(lambda x: x + 1, x)
            x = region.step(lambda x: x * 2, x, capture=LIVE)
        program = region.returning(region.step(clock.taking(50.0, lambda x: x - 1), x))
        twins = [
            dataclasses.replace(each, fn=layer) if number % 2 == 0 and number < 2 * num_layers else each
            for number, each in enumerate(program.steps)
        ]
        return dataclasses.replace(program, steps=tuple(twins))

    measured = []
    for num_layers in (1, 5):
        clock.measured.clear()
        program = layers(num_layers)
        runner = runner_of(program, timed_device(clock))
        for _ in range(6):
            x = randn(3)
            assert torch.equal(runner(x)[0], program.run(x)[0])
        assert runner.stats.plans[0].captured == [program.steps[-1].name], "all twins run live"
        measured.append(len(clock.measured))
    assert measured[0] == measured[1] > 0
