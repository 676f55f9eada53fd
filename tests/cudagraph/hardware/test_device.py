"""What devices of any kind do: generators, side streams, pools of their own, life after a fork. Simulated here."""

from __future__ import annotations

import gc
import os
import threading
import warnings
import weakref

import pytest
import torch

from graphcap.cudagraph import device_for
from graphcap.cudagraph.hardware.choose import set_graph_pool
from graphcap.cudagraph.hardware.devices import all_devices, drop_all_plans
from graphcap.cudagraph.hardware.generators import register_generator, registered
from graphcap.cudagraph.hardware.simulated import SimulatedDevice
from graphcap.cudagraph.hardware.simulated_recording import SimulatedStream
from tests.cudagraph.regions import LIVE, Region, randn, runner_of, warm


def doubled():
    region = Region()
    return region.returning(region.step(lambda x: x * 2, region.tensor("x")))


def drawing(generator=None):
    """Adds random numbers, in a captured step."""
    region = Region()
    x = region.tensor("x")
    return region.returning(region.step(lambda x: x + torch.rand(x.shape, generator=generator), x))


@pytest.mark.parametrize("own", [False, True], ids=["default generator", "registered generator"])
def test_replays_draw_new_numbers_and_follow_the_seed(own):
    generator = torch.Generator() if own else torch.default_generator
    if own:
        register_generator(generator)
    runner = runner_of(drawing(generator if own else None))
    x = torch.zeros(8)

    def draws(num):
        generator.manual_seed(3)
        return [runner(x)[0] for _ in range(num)]

    generator.manual_seed(3)
    expected = [torch.rand(8, generator=generator) for _ in range(6)]
    assert all(map(torch.equal, draws(6), expected)), "warm-ups, the capture and replays go on where the last one ended"
    assert runner.stats.replays == 3
    assert all(map(torch.equal, draws(3), expected))
    assert not torch.equal(expected[0], expected[1])


def test_generator_is_registered_for_its_life():
    cpu = torch.device("cpu")
    before = len(registered(cpu))
    generator = torch.Generator()
    for _ in range(2):
        register_generator(generator)
    assert [each is generator for each in registered(cpu)] == [*[False] * before, True]
    assert generator not in registered(torch.device("cuda", 0))
    holder = [generator]
    del generator
    assert len(registered(cpu)) == before + 1
    assert torch.is_tensor(holder.pop().get_state())
    assert len(registered(cpu)) == before, "nobody else holds it"
    with pytest.raises(TypeError, match=r"expected a torch\.Generator, got int"):
        register_generator(3)


def forking(side: SimulatedStream, joins: bool):
    region = Region()
    x = region.tensor("x")
    y = region.step(lambda x: x + 1, x)

    def fork(y):
        side.fork()
        z = y * 2
        if joins:
            side.join()
        return z

    z = region.step(fork, y)
    i = region.step(lambda y: y.argmax()[None], y)
    z = region.step(lambda z, i: z - z.index_select(0, i), z, i)  # fails when it is recorded alone: its index is poison
    return region.returning(z)


def forked_and_indexed(x):
    z = (x + 1) * 2
    return z - z.max()


def test_joined_side_stream_is_captured():
    runner = runner_of(forking(SimulatedStream(), joins=True))
    x = randn(4)
    warm(runner, x)
    assert runner.stats.plans[0].live == {}
    assert torch.equal(runner(x)[0], forked_and_indexed(x))


def test_step_that_leaves_a_side_stream_unjoined_is_named_and_runs_live():
    runner = runner_of(forking(SimulatedStream(), joins=False))
    for _ in range(6):
        x = randn(4)
        assert torch.equal(runner(x)[0], forked_and_indexed(x))
    (failure,) = runner.stats.failures
    assert failure.startswith("step_1: UnjoinedStreamError: a side stream that was forked inside of the capture")
    (plan,) = runner.stats.plans
    assert list(plan.live) == ["step_1"]
    assert plan.captured == ["step_0", "step_2", "step_3"]


def test_private_device_has_a_pool_and_a_lock_of_its_own_and_the_same_account():
    shared, _ = device_for(set(), simulate=True)
    one, _ = device_for(set(), simulate=True, private=True)
    other, _ = device_for(set(), simulate=True, private=True)
    assert len({id(each) for each in (shared, one, other)}) == 3
    assert len({id(each.lock) for each in (shared, one, other)}) == 3
    assert shared.account is one.account is other.account
    runner = runner_of(doubled(), one)
    warm(runner, randn(2))
    assert one.used_bytes() > 0
    assert other.used_bytes() == 0


def test_private_device_goes_with_its_runner():
    device = SimulatedDevice()
    reference = weakref.ref(device)
    runner = runner_of(doubled(), device)
    warm(runner, randn(2))
    del runner, device
    gc.collect()
    assert reference() is None


def test_private_pools_run_at_the_same_time():
    """Each replay waits, inside of a live step, for the other one to get there: with one lock they never would."""
    meeting = threading.Barrier(2, timeout=20)
    together = threading.Event()

    def program():
        region = Region()
        x = region.tensor("x")
        y = region.step(lambda x: x + 1, x)
        z = region.step(lambda y: (meeting.wait() if together.is_set() else 0, y * 2)[1], y, capture=LIVE)
        return region.returning(region.step(lambda z: z - 3, z))

    runners = [runner_of(program(), SimulatedDevice()) for _ in range(2)]
    for runner in runners:
        warm(runner, randn(2))
    together.set()
    results = {}

    def work(which):
        x = torch.full((2,), float(which))
        results[which] = runners[which](x)[0], (x + 1) * 2 - 3

    threads = [threading.Thread(target=work, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(*results[which]) for which in range(2))
    assert [runner.stats.replays for runner in runners] == [1, 1]


def in_child(check) -> bool:
    """Whether ``check()`` holds in a forked child."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns of a fork beside other threads
        child = os.fork()
    if child == 0:
        try:
            os._exit(0 if check() else 1)
        except BaseException:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_forked_child_gets_a_device_that_nobody_holds():
    device = SimulatedDevice()
    runner = runner_of(doubled(), device)
    x = randn(2)
    warm(runner, x)
    locked, done = threading.Event(), threading.Event()

    def hold():
        with device.lock:
            device.busy = True
            locked.set()
            done.wait()
            device.busy = False

    holder = threading.Thread(target=hold)
    holder.start()
    locked.wait()
    assert in_child(lambda: torch.equal(runner(x)[0], x * 2) and runner.stats.replays == 1)
    done.set()
    holder.join()
    assert torch.equal(runner(x)[0], x * 2)


class CudaLike(SimulatedDevice):
    """Simulated, and no use in a child."""

    def forked(self):
        super().forked()
        self.unusable = "forked process"
        self.enter = lambda: False


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_calls_run_live_in_the_child_where_the_device_cannot_be_used():
    runner = runner_of(doubled(), CudaLike())
    x = randn(2)
    warm(runner, x)

    def check():
        right = torch.equal(runner(x)[0], x * 2)
        return right and runner.stats.live_calls["forked process"] == 1 and runner.stats.replays == 0

    assert in_child(check)
    assert torch.equal(runner(x)[0], x * 2)
    assert runner.stats.replays == 1


def test_all_plans_can_be_dropped_at_once():
    devices = [SimulatedDevice() for _ in range(2)]
    runners = [runner_of(doubled(), device) for device in devices]
    for runner in runners:
        warm(runner, randn(2))
    assert set(devices) <= set(all_devices())
    drop_all_plans()
    assert [device.used_bytes() for device in devices] == [0, 0]
    x = randn(2)
    assert torch.equal(runners[0](x)[0], x * 2)


def test_graph_pool_must_be_a_mem_pool_on_cuda():
    with pytest.raises(TypeError, match=r"expected a torch\.cuda\.MemPool or None, got int"):
        set_graph_pool(3)
    with pytest.raises(ValueError, match="graphs are made on cuda only, not on cpu"):
        set_graph_pool(None, "cpu")
