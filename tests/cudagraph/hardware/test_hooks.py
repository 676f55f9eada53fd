"""Hooks around captures and replays: when they run, what a failing one does, and that none costs nothing."""

from __future__ import annotations

import pytest
import torch

from graphcap.cudagraph.hardware import hooks
from graphcap.cudagraph.hardware.simulated import SimulatedDevice
from tests.cudagraph.regions import LIVE, Region, randn, runner_of, warm


@pytest.fixture
def events():
    """What happened, in order; the hooks are gone after the test."""
    seen: list[str] = []
    handles = [
        hooks.on_capture_enter(lambda: seen.append("enter")),
        hooks.on_capture_exit(lambda: seen.append("exit")),
        hooks.before_replay(lambda: seen.append("replay")),
    ]
    yield seen
    for handle in handles:
        handle.remove()


def two_segments(events):
    def note(name, x):
        events.append(name)
        return x + 1

    region = Region()
    x = region.tensor("x")
    y = region.step(lambda x: note("first", x), x)
    z = region.step(lambda y: note("live", y), y, capture=LIVE)
    return region.returning(region.step(lambda z: note("second", z), z))


def test_hooks_surround_every_segment_and_come_before_every_plan(events):
    """Field notes row 32: a graph is replayed before what surrounds its capture has ended."""
    runner = runner_of(two_segments(events))
    runner(randn(2)), runner(randn(2))
    assert "enter" not in events
    events.clear()
    runner(randn(2))  # records each segment, then replays it at once (the simulated device calls the step again)
    assert events == ["replay", "enter", "first", "exit", "first", "live", "enter", "second", "exit", "second"]
    events.clear()
    runner(randn(2))
    assert events == ["replay", "first", "live", "second"]


def test_removed_hook_is_not_called_and_leaves_no_trace(events):
    device = SimulatedDevice()
    handle = hooks.before_replay(lambda: events.append("mine"))
    assert "enter" in vars(device), "the device calls hooks now"
    handle.remove()
    handle.remove()
    runner = runner_of(two_segments(events), device)
    warm(runner, randn(2))
    assert "mine" not in events


def test_without_hooks_the_device_is_as_if_there_were_none():
    handle = hooks.before_replay(lambda: None)
    device = SimulatedDevice()
    assert "enter" in vars(device)
    handle.remove()
    assert "enter" not in vars(device)
    assert "enter" not in vars(SimulatedDevice())


def test_hooks_of_one_kind_run_in_the_order_of_registration(events):
    handles = [hooks.before_replay(lambda name=name: events.append(name)) for name in "abc"]
    handles[1].remove()
    device = SimulatedDevice()
    assert device.enter()
    assert events == ["replay", "a", "c"]
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("register", [hooks.on_capture_enter, hooks.on_capture_exit])
def test_failing_capture_hook_is_named_and_the_model_runs_on(register):
    def breaks():
        raise ValueError("no copy stream")

    handle = register(breaks)
    program = two_segments([])
    runner = runner_of(program)

    def six_calls():
        for _ in range(6):
            x = randn(2)
            assert torch.equal(runner(x)[0], program.run(x)[0])

    try:
        with pytest.warns(UserWarning, match="captures failed 2 times"):
            six_calls()
    finally:
        handle.remove()
    assert runner.stats.plans == []
    kind = register.__name__
    name = breaks.__qualname__
    assert runner.stats.failures == [f"HookError: the {kind} hook {name} raised ValueError: no copy stream"] * 2, (
        "and no step is blamed"
    )


def test_failing_replay_hook_ends_the_call_and_not_the_plan():
    runner = runner_of(two_segments([]))
    warm(runner, randn(2))
    handle = hooks.before_replay(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        runner(randn(2))
    handle.remove()
    x = randn(2)
    assert torch.equal(runner(x)[0], x + 1 + 1 + 1)
    assert runner.stats.replays == 1


def test_hook_must_be_callable():
    with pytest.raises(TypeError, match="on_capture_exit: expected a function without arguments, got 3"):
        hooks.on_capture_exit(3)
