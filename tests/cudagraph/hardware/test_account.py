"""Graph memory under a budget, on the simulated device: who gives way, who runs live, and that every call is right."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphcap.cudagraph import GraphRunner
from graphcap.cudagraph.hardware import simulated_recording
from graphcap.cudagraph.hardware.account import RECENT_USES, Account, Usage
from graphcap.cudagraph.hardware.memory import memory
from graphcap.cudagraph.hardware.room import Room
from graphcap.cudagraph.hardware.simulated import SimulatedDevice
from graphcap.cudagraph.replaying.outputs import OutputPlan
from tests.cudagraph.padded_regions import N, PaddedRegion
from tests.cudagraph.regions import LIVE, Region, randn, runner_of, warm

PLAN = 4096  # bytes: one result of 1024 floats
ARENA = PLAN + 512  # bytes: the copied input of one runner, and its alignment


def grown():
    """One captured step: its plan holds one result of the input's size."""
    region = Region()
    n, x = region.size("n"), region.tensor("x")
    return region.returning(region.step(lambda n, x: x + n, n, x))


def call(runner: GraphRunner, n: int) -> None:
    """Call with the key ``n``; all keys have results of one size."""
    x = randn(1024)
    assert torch.equal(runner(n, x)[0], x + n)


def calls(runner: GraphRunner, n: int, num: int) -> None:
    for _ in range(num):
        call(runner, n)


def keys(runner: GraphRunner) -> list[int]:
    return [plan.key[0] for plan in runner.stats.plans]


def captured(runner: GraphRunner, *sizes: int) -> None:
    for n in sizes:
        for _ in range(3):
            call(runner, n)


def test_plans_stop_at_the_budget_and_the_rest_runs_live():
    """Field notes row 5: capture has no limit and ends in an out-of-memory error."""
    device = SimulatedDevice()
    runner = runner_of(grown(), device, max_graph_bytes=3 * PLAN + ARENA)
    captured(runner, 1, 2, 3, 4, 5)
    assert keys(runner) == [1, 2, 3]
    assert device.used_bytes() == 3 * PLAN
    for _ in range(3):
        call(runner, 5)
    (reason,) = [each for each in runner.stats.live_calls if each.startswith("no room")]
    assert f"max_graph_bytes={3 * PLAN + ARENA}" in reason
    assert runner.stats.failures == []


def test_plan_that_gives_way_gives_its_memory_back_at_once():
    """Without the collector, which may come much later."""
    device = SimulatedDevice()
    runner = runner_of(grown(), device, max_graph_bytes=2 * PLAN + ARENA)
    gc.collect()
    gc.disable()
    try:
        captured(runner, 1, 2)
        call(runner, 1)  # a plan that has been replayed is known by the ways to it
        calls(runner, 2, RECENT_USES + 1)
        captured(runner, 3)
        assert keys(runner) == [2, 3]
        assert len(device.account.holdings()) == 2
        assert device.used_bytes() == 2 * PLAN
    finally:
        gc.enable()


def test_plan_that_was_used_longest_ago_gives_way():
    """Field notes row 23: graphs of shapes that are gone hold memory for good."""
    runner = runner_of(grown(), max_graph_bytes=2 * PLAN + ARENA)
    captured(runner, 1, 2)
    call(runner, 1)  # so that 2 is the one used longest ago
    for _ in range(RECENT_USES):
        call(runner, 1)
    captured(runner, 3)
    assert keys(runner) == [1, 3]
    assert runner.stats.evictions == 1
    before = runner.stats.replays
    call(runner, 1)
    call(runner, 3)
    assert runner.stats.replays == before + 2


def test_shapes_in_turn_do_not_push_each_other_out():
    """More shapes than fit, all of them in use: capturing each in turn would cost far more than it gains."""
    runner = runner_of(grown(), max_graph_bytes=2 * PLAN + ARENA)
    for _ in range(100):
        for n in (1, 2, 3, 4):
            call(runner, n)
    assert keys(runner) == [1, 2]
    assert runner.stats.evictions == 0


def test_plan_of_another_runner_gives_way():
    device = SimulatedDevice()
    old, new = (runner_of(grown(), device, max_graph_bytes=2 * PLAN + 2 * ARENA) for _ in range(2))
    captured(old, 1, 2)
    captured(new, 1)
    assert keys(new) == [], "nothing gives way that was in use a moment ago"
    for _ in range(RECENT_USES + 1):
        call(old, 2)
    for _ in range(8):
        call(new, 1)
    assert keys(old) == [2]
    assert keys(new) == [1]
    assert device.used_bytes() == 2 * PLAN


def test_nothing_is_dropped_where_that_would_not_help():
    device = SimulatedDevice()
    small = runner_of(grown(), device)
    captured(small, 1)
    for _ in range(RECENT_USES + 1):
        device.account.tick()
    big = runner_of(grown(), device, max_graph_bytes=PLAN // 2)
    captured(big, 1)
    assert keys(small) == [1]
    assert keys(big) == []


def test_room_that_another_model_leaves_is_used():
    device = SimulatedDevice()
    first, second = (runner_of(grown(), device, max_graph_bytes=PLAN + 2 * ARENA) for _ in range(2))
    captured(first, 1)
    captured(second, 1)
    assert keys(second) == []
    first.release()
    for _ in range(8):
        call(second, 1)
    assert keys(second) == [1]


def test_shared_bytes_count_and_are_never_credited():
    device = SimulatedDevice()
    runner = runner_of(grown(), device, max_graph_bytes=PLAN)  # room for the result, not for the arena beside it
    captured(runner, 1)
    assert keys(runner) == []
    assert device.used_bytes() == 0
    wide = runner_of(grown(), device)
    captured(wide, 1)
    (plan,) = wide.stats.plans
    assert (plan.exclusive_bytes, plan.bytes) == (PLAN, PLAN + plan.shared_bytes)
    assert PLAN <= plan.shared_bytes <= ARENA


def rowwise():
    """The plan of a rung holds as many rows."""
    region = PaddedRegion()
    x = region.rows("x", 8)
    return region.program(region.step(lambda x: x + 1, x), sizes=[(N, 8)])


@pytest.mark.parametrize("order", [(16, 8, 32, 4, 2, 1), (32, 16, 8, 4, 2, 1), (32, 4, 2, 1)])
def test_small_plans_are_not_refused_for_the_size_of_large_ones(order):
    """A larger budget must not end in fewer plans: the largest one fits, and less than it took is left."""
    device = SimulatedDevice()
    free = runner_of(rowwise(), device, capture_sizes=sorted(order))
    for n in order * 3:
        free(n, randn(n, 8))
    used = device.account.used_bytes(device, device.shared_bytes())
    runner = runner_of(rowwise(), capture_sizes=sorted(order), max_graph_bytes=used)
    for n in order * 3:
        runner(n, randn(n, 8))
    assert {plan.key[0] for plan in runner.stats.plans} == {*order}, runner.stats.live_calls


def test_a_guess_that_kept_a_plan_out_is_made_anew():
    """When it asks again, more may be known."""
    room = Room(SimulatedDevice(), max_graph_bytes=1000)
    assert "needs 1200" in room.make("small", 1200)
    assert room.make("small", 100) == Usage(0, 0)


def test_what_a_plan_took_counts_more_than_a_guess():
    room = Room(SimulatedDevice(), max_graph_bytes=1000)
    assert "needs 1200" in room.take("large", Usage(1200, 0), 0, lambda: None)
    assert "needs 1200" in room.make("large", 0)


def test_a_plan_larger_than_the_budget_is_tried_once():
    device = SimulatedDevice()
    runner = runner_of(grown(), device, max_graph_bytes=100)
    recordings = []
    begin = runner.device.begin
    runner.device.begin = lambda *args: recordings.append(1) or begin(*args)
    for _ in range(100):
        call(runner, 1)
    assert len(recordings) == 1
    assert runner.stats.plans == []
    assert device.usage() == Usage(0, 0), "what the attempt took has gone back"


@pytest.mark.parametrize("capacity", [0, 100, PLAN, PLAN + ARENA // 2])
def test_full_device_leaves_a_working_model(capacity):
    """Field notes row 5: a device that is full in the middle of a capture takes the model down."""
    device = SimulatedDevice(capacity=capacity)
    runner = runner_of(grown(), device)
    with pytest.warns(UserWarning, match="ran out of memory during a capture"):
        calls(runner, 1, 100)
    assert runner.stats.plans == []
    assert len(runner.stats.failures) == 2, "one more try, no storm"
    gc.collect()
    assert device.usage() == Usage(0, 0), "what the aborted captures took is free again"
    reason = "no room: simulated ran out of memory during a capture"
    assert runner.stats.live_calls[reason] + runner.stats.live_calls["warm-up"] >= 96


def test_full_device_drops_a_plan_out_of_use_for_a_new_one():
    device = SimulatedDevice(capacity=2 * PLAN + ARENA)
    runner = runner_of(grown(), device)
    captured(runner, 1, 2)
    for _ in range(RECENT_USES + 1):
        call(runner, 2)
    with pytest.warns(UserWarning, match="ran out of memory"):
        calls(runner, 3, 40)
    assert sorted(keys(runner)) == [2, 3]


def test_full_device_in_the_middle_of_a_capture_has_every_effect_once():
    region = Region()
    state, x = region.tensor("state"), region.tensor("x")
    a = region.step(lambda s, x: s.add_(1) + x, state, x, mutates=[state])
    b = region.step(lambda a: a * 2, a, capture=LIVE)
    program = region.returning(region.step(lambda s, b: s.add_(10) + b, state, b, mutates=[state]))
    arena = 3 * (PLAN + 512)
    for capacity in range(0, 8 * PLAN, PLAN):
        runner = runner_of(program, SimulatedDevice(capacity=capacity + arena))
        state, expected = torch.zeros(1024), torch.zeros(1024)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(12):
                x = randn(1024)
                assert torch.equal(runner(state, x)[0], program.run(expected, x)[0])
                assert torch.equal(state, expected)


def test_no_memory_for_the_copies_of_the_outputs_when_everything_has_run(monkeypatch):
    """The capturing call then hands out the recorded results themselves, and no plan may ever write them again."""
    region = Region()
    state, x = region.tensor("state"), region.tensor("x")
    y = region.step(lambda s, x: s.add_(1) + x, state, x, mutates=[state])
    z = region.step(lambda y: y * 2, y, capture=LIVE)
    program = region.returning(y, region.step(lambda z: z[1:] - 3, z), region.step(lambda y: y[:2], y), state)
    runner = runner_of(program)
    collect, num_collected = OutputPlan.collect, [0]

    def full(plan, slots):
        num_collected[0] += 1
        if num_collected[0] == 1:
            raise torch.OutOfMemoryError("no room for a copy")
        return collect(plan, slots)

    monkeypatch.setattr(OutputPlan, "collect", full)
    state, expected_state, kept = torch.zeros(4), torch.zeros(4), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(12):
            x = randn(4)
            got, expected = runner(state, x), program.run(expected_state, x)
            assert torch.equal(state, expected_state)
            assert got[3] is state
            kept += [(mine, theirs) for mine, theirs in zip(got[:3], expected[:3], strict=True)]
    gc.collect()
    assert all(torch.equal(mine, theirs) for mine, theirs in kept)
    assert runner.stats.failures == ["OutOfMemoryError: no room for a copy"]
    assert len(runner.stats.plans) == 1, "the second try went well"


def test_aborted_capture_gives_everything_back_before_the_live_run():
    device = SimulatedDevice(capacity=ARENA + PLAN + PLAN // 2)
    free_for_live_run = []

    def step(x):
        if simulated_recording._thread.recording is None:
            free_for_live_run.append(device.capacity - sum(device.usage()))
        return x + 1

    region = Region()
    x = region.tensor("x")
    y = region.step(step, x)
    program = region.returning(region.step(lambda y: y * 2, y))  # this result does not fit
    runner = runner_of(program, device)
    x = randn(1024)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):
            assert torch.equal(runner(x)[0], (x + 1) * 2)
    assert len(runner.stats.failures) == 1, "the third call has tried a capture"
    assert free_for_live_run == [device.capacity] * 3


def test_release_forgets_what_was_refused():
    device = SimulatedDevice(capacity=0)
    runner = runner_of(grown(), device)
    with pytest.warns(UserWarning, match="ran out of memory"):
        calls(runner, 1, 20)
    device.capacity = None
    runner.release()
    call(runner, 1)
    assert keys(runner) == [1]


def test_memory_shows_what_is_held_and_the_ceiling():
    device = SimulatedDevice(Account("bench"))
    runner = runner_of(grown(), device, max_graph_bytes=2**20)
    captured(runner, 1, 2)
    found = memory()["bench"]
    assert (found.num_plans, found.exclusive_bytes, found.ceiling_bytes) == (2, 2 * PLAN, 2**20)
    assert found.used_bytes == found.exclusive_bytes + found.shared_bytes
    runner.release()
    del runner
    gc.collect()
    assert (memory()["bench"].num_plans, memory()["bench"].used_bytes) == (0, 0)


def test_plans_leave_the_account_with_their_runner():
    device = SimulatedDevice()
    runner = runner_of(grown(), device)
    captured(runner, 1, 2)
    assert device.account.exclusive_bytes() == 2 * PLAN
    del runner
    assert device.account.exclusive_bytes() == 0, "without waiting for the garbage collector"


def test_private_pools_share_the_account_and_spare_a_device_that_is_busy():
    one = SimulatedDevice()
    other = SimulatedDevice(one.account)
    limit = PLAN + 2 * ARENA
    asleep = runner_of(grown(), one, max_graph_bytes=limit)
    captured(asleep, 1)
    for _ in range(RECENT_USES + 1):
        one.account.tick()
    one.account.open(0, other, lambda: None)
    late = runner_of(grown(), other, max_graph_bytes=limit)
    keep = one.account.open(0, other, lambda: None)  # the latest use
    one.busy = True
    captured(late, 1)
    assert keys(asleep) == [1]
    assert keys(late) == []
    one.busy = False
    for _ in range(8):
        call(late, 1)
    assert keys(asleep) == []
    assert keys(late) == [1]
    del keep


def test_usage_never_shrinks():
    assert Usage(5, 7).since(Usage(6, 3)) == Usage(0, 4)


@given(st.lists(st.integers(0, 5), max_size=120), st.integers(0, 5))
@settings(max_examples=15)
def test_any_sequence_of_calls_stays_within_the_budget(sequence, num_fitting):
    device = SimulatedDevice()
    limit = num_fitting * PLAN + ARENA
    runner = runner_of(grown(), device, max_graph_bytes=limit)
    for n in sequence:
        call(runner, n)
        assert device.account.exclusive_bytes() + device.account.shared_bytes() <= limit
        assert device.account.exclusive_bytes() == device.used_bytes()
        assert len(runner.stats.plans) <= num_fitting


def test_warm_plan_marks_its_use():
    device = SimulatedDevice()
    runner = runner_of(grown(), device)
    warm(runner, 1, randn(1024))
    warm(runner, 2, randn(1024))
    call(runner, 1)
    assert [holding.last_use for holding in device.account.holdings()] == [2, 3]


@pytest.mark.parametrize("spare", range(-2, 9, 2))
def test_full_device_while_a_padded_call_is_captured(spare):
    """The rows of a padded call lie in static memory from the beginning, so a live run reads them there."""
    region = PaddedRegion()
    x = region.rows("x", 128)
    total = region.state("total", 128)
    y = region.step(lambda x: x * 2, x)
    z = region.step(lambda y: y - 1, y)
    region.step(lambda total: total.add_(1), total, mutates=[total])
    program = region.program(region.step(lambda y, z: y + z, y, z), sizes=[(N, 128)])
    device = SimulatedDevice(capacity=ARENA + spare * PLAN // 2)
    runner = runner_of(program, device, capture_sizes=[8], dynamic_arg_dims={"x": {0: "n"}}, pad={"x": 0})
    state, expected_state = torch.zeros(128), torch.zeros(128)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(20):
            x = randn(7, 128)
            (got,) = runner(7, x, state)
            assert torch.equal(got, program.run(7, x, expected_state)[0])
            assert torch.equal(state, expected_state)
    assert runner.stats.failures or runner.stats.plans
