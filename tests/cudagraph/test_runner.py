"""When a call is captured, replayed or run live, and that its effects happen exactly once each time."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref

import pytest
import torch

from graphcap.cudagraph import Capture, Constant
from graphcap.cudagraph.hardware.simulated import SimulatedDevice
from graphcap.cudagraph.replaying import plan_table
from tests.cudagraph.regions import LIVE, Region, randn, runner_of, warm


def doubled():
    region = Region()
    x = region.tensor("x")
    return region.returning(region.step(lambda x: x * 2, x))


def sized():
    region = Region()
    n, x = region.size("n"), region.tensor("x")
    return region.returning(region.step(lambda n, x: x + n, n, x))


def test_third_sighting_is_captured_and_the_fourth_replayed():
    runner = runner_of(doubled())
    for call in range(4):
        x = randn(3)
        assert torch.equal(runner(x)[0], x * 2)
        assert len(runner.stats.plans) == (call >= 2)
    assert runner.stats.replays == 1
    assert runner.stats.live_calls == {"warm-up": 2}


def test_capture_after_two_leaves_one_warm_up():
    runner = runner_of(doubled(), capture_after=2)
    warm(runner, randn(3), calls=2)
    assert runner.stats.live_calls == {"warm-up": 1}


def test_each_size_has_a_plan_of_its_own():
    runner = runner_of(sized())
    for n in (2, 5):
        warm(runner, n, randn(n))
    for n in (2, 5, 2):
        x = randn(n)
        assert torch.equal(runner(n, x)[0], x + n)
    assert [plan.key for plan in runner.stats.plans] == [(2,), (5,)]
    assert [plan.replays for plan in runner.stats.plans] == [2, 1]


def test_declared_size_is_captured_at_its_second_sight():
    runner = runner_of(sized(), capture_sizes=(4,))
    for n in (4, 5):
        runner(n, randn(n))
        runner(n, randn(n))
    assert [plan.key for plan in runner.stats.plans] == [(4,)]


def test_sizes_above_the_limit_stay_live():
    runner = runner_of(sized(), max_capture_size=4)
    for _ in range(4):
        runner(5, randn(5))
    assert not runner.stats.plans
    assert runner.stats.live_calls == {"above max_capture_size=4": 4}


def test_no_more_plans_than_allowed():
    runner = runner_of(sized(), max_plans=1)
    warm(runner, 2, randn(2))
    for _ in range(3):
        x = randn(3)
        assert torch.equal(runner(3, x)[0], x + 3)
    assert len(runner.stats.plans) == 1
    assert runner.stats.live_calls["max_plans=1 reached"] == 3


def accumulating(capture=Capture.ALWAYS):
    """Adds x to a state argument, twice with a step in between, and appends to a cache at a position."""
    region = Region()
    state, cache, where, x = (region.tensor(name) for name in ("state", "cache", "where", "x"))
    total = region.step(lambda state, x: state.add_(x), state, x, mutates=[state])
    row = region.step(lambda total: total * 10, total, capture=capture)
    kept = region.step(
        lambda cache, where, row: cache.index_copy_(0, where, row[None]), cache, where, row, mutates=[cache]
    )
    again = region.step(lambda state: state.add_(1), state, mutates=[state], capture=capture)
    return region.returning(kept, again, row)


@pytest.mark.parametrize("capture", [Capture.ALWAYS, LIVE])
def test_effects_happen_once_whether_live_captured_or_replayed(capture):
    state, cache = torch.zeros(2), torch.zeros(6, 2)
    expected_state, expected_cache = state.clone(), cache.clone()
    program = accumulating(capture)
    runner = runner_of(program)
    for call in range(6):
        where, x = torch.tensor([call]), randn(2)
        expected = program.run(expected_state, expected_cache, where, x)
        got = runner(state, cache, where, x)
        assert torch.equal(state, expected_state)
        assert torch.equal(cache, expected_cache)
        assert torch.equal(got[2], expected[2])
        assert got[0].data_ptr() == cache.data_ptr()
        assert got[1].data_ptr() == state.data_ptr()
    assert runner.stats.replays == 3
    assert runner.stats.bindings == {"state": "static", "cache": "static", "where": "copied", "x": "copied"}


def syncing(fails_in: int):
    """Three steps that count up a state; one of them waits for the device."""
    region = Region()
    state, x = region.tensor("state"), region.tensor("x")

    def ok(state, x):
        state.add_(x)
        return state * 2

    def sync(state, x):
        state.add_(x)
        return state * float(x.sum())

    outs = [region.step(sync if at == fails_in else ok, state, x, mutates=[state]) for at in range(3)]
    return region.returning(*outs)


@pytest.mark.parametrize("fails_in", [0, 1, 2])
def test_failed_capture_has_its_effects_once_and_demotes_the_step(fails_in):
    program = syncing(fails_in)
    runner = runner_of(program)
    state, expected_state = torch.zeros(2), torch.zeros(2)
    for _ in range(6):
        x = randn(2)
        expected = program.run(expected_state, x)
        for mine, theirs in zip(runner(state, x), expected, strict=True):
            torch.testing.assert_close(mine, theirs)
        torch.testing.assert_close(state, expected_state)
    (plan,) = runner.stats.plans
    assert list(plan.live) == [f"step_{fails_in}"]
    assert "SimulatedCaptureError" in runner.stats.failures[0]
    assert len(runner.stats.failures) == 1
    assert runner.stats.replays == 2


class FailingDevice(SimulatedDevice):
    """Refuses the first recordings at their end."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def begin(self, pool, released):
        recording = super().begin(pool, released)
        end = recording.end

        def failing_end():
            if self.times:
                self.times -= 1
                raise RuntimeError("refused as a whole")
            return end()

        recording.end = failing_end
        return recording


def test_capture_refused_at_its_end_has_its_effects_once():
    region = Region()
    state, x = region.tensor("state"), region.tensor("x")
    first = region.step(lambda s, x: s.add_(x) * 1, state, x, mutates=[state])
    middle = region.step(lambda a: a + 1, first, capture=LIVE)
    last = region.step(lambda s, m: s.add_(m) * 3, state, middle, mutates=[state])
    program = region.returning(first, last)
    runner = runner_of(program, FailingDevice(1))
    state, expected_state = torch.zeros(2), torch.zeros(2)
    for _ in range(6):
        x = randn(2)
        expected = program.run(expected_state, x)
        assert all(map(torch.equal, runner(state, x), expected))
        assert torch.equal(state, expected_state)
    assert runner.stats.failures == ["step_0: RuntimeError: refused as a whole"]
    assert list(runner.stats.plans[0].live) == ["step_0", "step_1"]


class BrokenDevice(SimulatedDevice):
    """Cannot make static buffers."""

    def allocate(self, nbytes):
        raise ValueError("not allocated")


def test_model_runs_on_when_a_capture_cannot_begin():
    runner = runner_of(doubled(), BrokenDevice())
    for call in range(6):
        x = randn(2)
        with pytest.warns(UserWarning, match="not allocated") if call == 3 else contextlib.nullcontext():
            assert torch.equal(runner(x)[0], x * 2)
    assert runner.stats.failures == ["ValueError: not allocated"] * 2
    assert runner.stats.live_calls["capture failed: ValueError: not allocated"] == 2


def test_second_failure_ends_capturing_with_one_warning():
    region = Region()
    x = region.tensor("x")
    y = region.step(lambda x: x + 1, x)
    z = region.step(lambda y: y * 2, y, capture=LIVE)
    program = region.returning(region.step(lambda z: z - 3, z))
    runner = runner_of(program, FailingDevice(5))
    runner(randn(2)), runner(randn(2)), runner(randn(2))
    with pytest.warns(UserWarning, match="refused as a whole"):
        runner(randn(2))
    for _ in range(3):
        x = randn(2)
        assert torch.equal(runner(x)[0], (x + 1) * 2 - 3)
    assert len(runner.stats.failures) == 2
    assert not runner.stats.plans


@pytest.mark.parametrize("capture", [Capture.ALWAYS, LIVE])
def test_error_of_the_model_comes_through_as_live(capture):
    region = Region()
    x = region.tensor("x")

    def refuse(x):
        raise KeyError("no such row")

    y = region.step(lambda x: x + 1, x)
    calls = []
    program = region.returning(
        region.step(lambda y: calls.append(1) or (y if len(calls) < 3 else refuse(y)), y, capture=capture)
    )
    runner = runner_of(program)
    runner(randn(2)), runner(randn(2))
    with pytest.raises(KeyError, match="no such row"):
        runner(randn(2))


def test_constants_and_numbers_are_returned():
    region = Region()
    n, k, x = region.size("n"), region.size("k", in_key=False), region.tensor("x")
    y = region.step(lambda n, x: x + n, n, x)
    z = region.step(lambda k, y: y * k, k, y, capture=LIVE)
    program = region.returning(Constant(None), z, n, k, Constant("text"))
    runner = runner_of(program)
    for k in range(6):
        x = randn(2)
        none, z, n, got_k, text = runner(2, k, x)
        assert (none, n, got_k, text) == (None, 2, k, "text")
        assert torch.equal(z, (x + 2) * k)
    assert runner.stats.replays == 3


def test_captured_reader_of_a_free_number_becomes_live():
    region = Region()
    k, x = region.size("k", in_key=False), region.tensor("x")
    y = region.step(lambda k, x: x * k, k, x)
    program = region.returning(region.step(lambda y: y + 1, y))
    runner = runner_of(program)
    for k in range(6):
        x = randn(2)
        assert torch.equal(runner(k, x)[0], x * k + 1)
    assert runner.stats.plans[0].live == {"step_0": "input k is a number that the key does not fix"}


def test_region_without_capturable_steps_is_left_alone():
    region = Region()
    x = region.tensor("x")
    runner = runner_of(region.returning(region.step(lambda x: x + 1, x, capture=LIVE)))
    for _ in range(5):
        runner(randn(2))
    assert runner.stats.live_calls["nothing to capture: for the test"] == 3


def test_full_mode_captures_what_piecewise_leaves_live():
    def attention():
        region = Region()
        x = region.tensor("x")
        y = region.step(lambda x: x + 1, x)
        z = region.step(lambda y: y.softmax(0), y, capture=Capture.FULL)
        return region.returning(region.step(lambda z: z * 2, z))

    segments = {}
    for mode in ("PIECEWISE", "FULL", "AUTO"):
        runner = runner_of(attention(), cudagraph_mode=mode)
        warm(runner, randn(3), calls=3)
        x = randn(3)
        torch.testing.assert_close(runner(x)[0], (x + 1).softmax(0) * 2)
        segments[mode] = runner.stats.plans[0].num_segments
    assert segments == {"PIECEWISE": 2, "FULL": 1, "AUTO": 1}


@pytest.mark.parametrize(
    ("first", "second"), [(torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)]
)
def test_capture_in_one_mode_and_replay_in_the_other(first, second):
    region = Region()
    state, x = region.static("state"), region.tensor("x")
    y = region.step(lambda s, x: s.add_(1) * x, state, x, mutates=[state])
    z = region.step(lambda y: y + 1, y, capture=LIVE)
    program = region.returning(region.step(lambda z: z * 2, z), y, z)
    runner = runner_of(program)
    state, expected_state = torch.zeros(2), torch.zeros(2)
    for mode, calls in ((first, 4), (second, 3), (first, 2)):
        with mode():
            for _ in range(calls):
                x = randn(2)
                expected = program.run(expected_state, x)
                assert all(map(torch.equal, runner(state, x), expected))
    assert runner.stats.replays == 6
    assert torch.equal(state, expected_state)


def test_grad_mode_of_the_caller_leaves_static_memory_out_of_the_graph():
    weight = torch.nn.Parameter(randn(3))
    region = Region()
    w, x = region.static("w"), region.tensor("x")
    runner = runner_of(region.returning(region.step(lambda w, x: w * x, w, x)))
    with torch.no_grad():
        warm(runner, weight, randn(3))
    x = randn(3)
    with torch.enable_grad():
        (y,) = runner(weight, x)
        (z,) = runner(weight, x)
    assert torch.equal(y, (weight * x).detach())
    assert torch.equal(z, y)


def test_no_tensor_of_the_caller_is_kept():
    region = Region()
    weight, cache, x = region.static("weight"), region.tensor("cache"), region.tensor("x")
    y = region.step(lambda w, x: w * x, weight, x)
    z = region.step(lambda c, y: c.add_(y) * 2, cache, y, mutates=[cache], capture=LIVE)
    runner = runner_of(region.returning(region.step(lambda z, x: z - x, z, x)))
    held = []
    weight = randn(2)
    for _ in range(5):
        cache, x = randn(2), randn(2)
        held += [weakref.ref(cache), weakref.ref(x)]
        runner(weight, cache, x)
    assert runner.stats.replays == 2
    held.append(weakref.ref(weight))
    del weight, cache, x
    gc.collect()
    assert [ref() for ref in held] == [None] * len(held)


def test_release_drops_plans_and_a_later_call_captures_again():
    runner = runner_of(doubled())
    warm(runner, randn(2))
    runner.release()
    assert not runner.stats.plans
    x = randn(2)
    assert torch.equal(runner(x)[0], x * 2)
    assert len(runner.stats.plans) == 1


def test_pool_memory_goes_with_the_last_plan():
    """Field notes row 32: the pool outlives or predeceases the graphs in it."""
    device = SimulatedDevice()
    runners = [runner_of(doubled(), device) for _ in range(2)]
    for runner in runners:
        warm(runner, randn(2))
    assert device.used_bytes() > 0
    runners[0].release()
    assert device.used_bytes() > 0
    runners[1].release()
    gc.collect()
    assert device.used_bytes() == 0


def test_runner_called_from_inside_a_replay_runs_live():
    device = SimulatedDevice()
    inner = runner_of(doubled(), device)
    warm(inner, randn(2))
    region = Region()
    x = region.tensor("x")
    y = region.step(lambda x: x + 1, x)
    z = region.step(lambda y: inner(y)[0], y, capture=LIVE)
    outer = runner_of(region.returning(region.step(lambda y, z: y + z, y, z)), device)
    for _ in range(5):
        x = randn(2)
        assert torch.equal(outer(x)[0], (x + 1) * 3)
    assert outer.stats.replays == 2
    assert inner.stats.live_calls["inside another capture or replay"] == 3


def test_threads_share_a_device():
    device = SimulatedDevice()
    region = Region()
    n, x = region.size("n"), region.tensor("x")
    y = region.step(lambda n, x: x + n, n, x)
    z = region.step(lambda y: y * 2, y, capture=LIVE)
    split = runner_of(region.returning(region.step(lambda y, z: y - z, y, z), y), device)
    whole = runner_of(sized(), device)
    wrong = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for call in range(40):
            n = 2 + (seed + call) % 3
            x = torch.randn(n, generator=generator)
            (out, y), (plain,) = split(n, x), whole(n, x)
            if not (torch.equal(out, -(x + n)) and torch.equal(y, x + n) and torch.equal(plain, x + n)):
                wrong.append((seed, call))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(split.stats.plans) == len(whole.stats.plans) == 3


def test_ways_to_plans_are_forgotten_together(monkeypatch):
    """A table that is full begins anew; nothing that a plan keeps about its calls grows for ever."""
    monkeypatch.setattr(plan_table, "_MAX_SERVED", 2)
    runner = runner_of(sized())
    for n in (1, 2, 3):
        for _ in range(3):
            runner(n, randn(4))
    for n in (1, 2, 3) * 4:
        runner(n, randn(4))
    kept = [key for plan in runner._table.plans.values() for key in plan.served]
    assert sorted(kept) == sorted(runner._table.served)
    assert len(kept) <= 2
