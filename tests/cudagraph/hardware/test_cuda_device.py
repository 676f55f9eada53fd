"""What surrounds real CUDA graphs: hooks, side streams, generators, pools of their own, forked children."""

from __future__ import annotations

import contextlib
import gc
import threading

import pytest
import torch

from graphcap.cudagraph import device_for
from graphcap.cudagraph.hardware import hooks
from graphcap.cudagraph.hardware.generators import register_generator
from tests.cudagraph.hardware.test_device import in_child
from tests.cudagraph.regions import LIVE, Region, runner_of, warm

pytestmark = pytest.mark.gpu


def cuda_device(private=False):
    found, reason = device_for({torch.device("cuda", 0)}, simulate=False, private=private)
    assert found is not None, reason
    return found


@pytest.fixture
def device():
    return cuda_device()


def randn(*size):
    return torch.randn(*size, device="cuda")


def two_segments():
    region = Region()
    x = region.tensor("x")
    y = region.step(lambda x: x * 2, x)
    z = region.step(lambda y: y + 1, y, capture=LIVE)
    return region.returning(region.step(lambda z: z * z, z))


def test_hooks_run_where_they_should(device):
    events = []

    def note(name):
        return lambda: events.append((name, torch.cuda.is_current_stream_capturing()))

    handles = [
        hooks.on_capture_enter(note("enter")),
        hooks.on_capture_exit(note("exit")),
        hooks.before_replay(note("replay")),
    ]
    try:
        runner = runner_of(two_segments(), device)
        x = randn(64)
        warm(runner, x)
        assert events == [("replay", False), *[("enter", False), ("exit", True)] * 2]
        events.clear()
        torch.testing.assert_close(runner(x)[0], (x * 2 + 1) ** 2)
        assert events == [("replay", False)]
    finally:
        for handle in handles:
            handle.remove()
    events.clear()
    runner(x)
    assert events == []


def forking(side):
    """Step 1 computes on a side stream, and joins it only where no graph is captured."""
    region = Region()
    x = region.tensor("x")
    y = region.step(lambda x: x + 1, x)

    def fork(y):
        current = torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            z = y * 2
        if not torch.cuda.is_current_stream_capturing():
            current.wait_stream(side)
        return z

    z = region.step(fork, y)
    return region.returning(z, region.step(lambda y: y - 3, y))


def test_step_that_leaves_a_side_stream_unjoined_is_named_and_runs_live(device):
    runner = runner_of(forking(torch.cuda.Stream()), device)
    for _ in range(6):
        x = randn(1000)
        doubled, rest = runner(x)
        torch.cuda.synchronize()
        assert torch.equal(doubled, (x + 1) * 2)
        assert torch.equal(rest, x + 1 - 3)
    (failure,) = runner.stats.failures
    assert failure.startswith("step_1: UnjoinedStreamError")
    assert "wait_stream(side)" in failure
    (plan,) = runner.stats.plans
    assert list(plan.live) == ["step_1"]
    held = [torch.empty(2**20, device="cuda") for _ in range(8)]
    del held
    torch.cuda.empty_cache()
    other = runner_of(two_segments(), device)
    x = randn(64)
    warm(other, x)
    torch.testing.assert_close(other(x)[0], (x * 2 + 1) ** 2)


def test_capture_exit_hook_may_join_a_copy_stream(device):
    side = torch.cuda.Stream()

    def join():
        with torch.cuda.stream(side):
            forked = torch.cuda.is_current_stream_capturing()
        if forked:
            torch.cuda.current_stream().wait_stream(side)

    handle = hooks.on_capture_exit(join)
    try:
        runner = runner_of(forking(side), device)
        for _ in range(6):
            x = randn(1000)
            doubled, _ = runner(x)
            torch.cuda.synchronize()
            assert torch.equal(doubled, (x + 1) * 2)
        assert runner.stats.failures == []
        assert runner.stats.plans[0].live == {}
        other = runner_of(two_segments(), device)  # nothing is forked in it
        warm(other, randn(64))
    finally:
        handle.remove()


def drawing(generator):
    region = Region()
    x = region.tensor("x")
    fn = lambda x: x + torch.rand(x.shape, device=x.device, generator=generator)  # noqa: E731
    return region.returning(region.step(fn, x))


def test_registered_generator_goes_on_between_replays_and_follows_its_seed(device):
    generator = torch.Generator("cuda")
    register_generator(generator)
    runner = runner_of(drawing(generator), device)
    x = torch.zeros(64, device="cuda")
    warm(runner, x)
    assert runner.stats.failures == []
    generator.manual_seed(3)
    first, second = runner(x)[0], runner(x)[0]
    generator.manual_seed(3)
    assert torch.equal(runner(x)[0], first)
    assert torch.equal(runner(x)[0], second)
    assert not torch.equal(first, second)
    generator.manual_seed(3)
    assert torch.equal(torch.rand(64, device="cuda", generator=generator), first), "the numbers of a live call"
    assert runner.stats.replays == 4


def test_unknown_generator_is_named_in_the_reason_and_runs_live(device):
    generator = torch.Generator("cuda").manual_seed(1)
    region = Region()
    x = region.tensor("x")
    y = region.step(lambda x: x + 1, x)
    fn = lambda y: y + torch.rand(y.shape, device=y.device, generator=generator)  # noqa: E731
    runner = runner_of(region.returning(region.step(fn, y)), device)
    x = torch.zeros(64, device="cuda")
    results = [runner(x)[0] for _ in range(6)]
    assert len(runner.stats.failures) == 1
    assert "graphcap.register_generator" in runner.stats.failures[0]
    assert list(runner.stats.plans[0].live) == ["step_1"]
    generator.manual_seed(1)
    for result in results:
        torch.testing.assert_close(result, 1 + torch.rand(64, device="cuda", generator=generator))


def test_private_pools_in_two_threads():
    devices = [cuda_device(private=True) for _ in range(2)]
    assert devices[0].lock is not devices[1].lock
    assert devices[0].account is devices[1].account
    program, errors = two_segments(), []
    runners = [runner_of(program, device) for device in devices]

    def work(which):
        try:
            with torch.cuda.stream(torch.cuda.Stream()), torch.no_grad():
                generator = torch.Generator("cuda").manual_seed(which)
                for _ in range(50):
                    x = torch.randn(4096, device="cuda", generator=generator)
                    torch.testing.assert_close(runners[which](x)[0], (x * 2 + 1) ** 2)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert [runner.stats.replays for runner in runners] == [47, 47]
    handles = [device._pool().handle for device in devices]
    assert handles[0] != handles[1]
    assert devices[0]._stream.cuda_stream != devices[1]._stream.cuda_stream
    runners.clear()
    gc.collect()
    assert [device._pool() for device in devices] == [None, None]


def test_forked_child_does_not_touch_the_plans_of_its_parent(device):
    runner = runner_of(two_segments(), device)
    x = randn(64)
    warm(runner, x)

    def check():
        with contextlib.suppress(RuntimeError):  # torch refuses to use CUDA here
            runner(x)
        (reason,) = [each for each in runner.stats.live_calls if each.startswith("forked process")]
        return runner.stats.live_calls[reason] == 1 and runner.stats.replays == 0

    assert in_child(check)
    torch.testing.assert_close(runner(x)[0], (x * 2 + 1) ** 2)
    assert runner.stats.replays == 1
