"""Memory of a result is released right after the last reader of it and of its views; not before, not much later."""

from __future__ import annotations

import torch

from graphcap.cudagraph.hardware.simulated import SimulatedDevice
from graphcap.cudagraph.hardware.simulated_recording import SimulatedRecording
from graphcap.cudagraph.recording.liveness import last_reads, releases
from graphcap.cudagraph.recording.observe import observe
from tests.cudagraph.regions import LIVE, Region, randn, runner_of

CPU = torch.device("cpu")


def chain():
    """x -> a -> (view of a) -> live -> reads the view, and a second segment reads it last."""
    region = Region()
    x = region.tensor("x")
    a = region.step(lambda x: x + 1, x)
    view = region.step(lambda a: a[1:], a)
    b = region.step(lambda a: a * 2, a)
    c = region.step(lambda v, b: v + b[1:], view, b, capture=LIVE)
    d = region.step(lambda c, v: c * v, c, view)
    e = region.step(lambda d: d - 1, d)
    return region.returning(region.step(lambda e: e * 2, e))


def test_last_reads():
    assert last_reads(chain()) == [0, 2, 4, 3, 4, 5, 6, 7]


def test_view_keeps_the_memory_of_its_base():
    program = chain()
    seen, _ = observe(program, [randn(3)], CPU)
    assert seen.roots == (0, 1, 1, 3, 4, 5, 6, 7)
    assert releases(program, seen.roots) == ((), (), (), (3,), (1, 2, 4), (5,), (6,))


def test_dead_result_is_released_where_it_is_made():
    region = Region()
    x = region.tensor("x")
    used, unused = region.step(lambda x: (x + 1, x + 2), x, writes=2)
    program = region.returning(used)
    seen, _ = observe(program, [randn(3)], CPU)
    assert releases(program, seen.roots) == ((unused,),)


class Releasing(SimulatedDevice):
    """Counts releases, and releases too early by request: when the memory is first read instead of last."""

    def __init__(self, early: bool) -> None:
        super().__init__()
        self.num_released = 0
        self.early = early

    def begin(self, pool, released):
        device, self.num_released = self, self.num_released + len(released)

        class Counting(SimulatedRecording):
            def call(self, fn, args):
                results = super().call(fn, args)
                for arg in args if device.early else ():
                    super().release(arg)
                return results

            def release(self, tensor):
                device.num_released += 1
                super().release(tensor)

        return Counting(pool, released)


def replayed_right(device):
    runner = runner_of(chain(), device)
    right = True
    for _ in range(5):
        x = randn(3)
        a = x + 1
        right &= torch.equal(runner(x)[0], ((a[1:] + a[1:] * 2) * a[1:] - 1) * 2)
    return right and runner.stats.replays == 2


def test_replay_survives_poisoned_releases_and_everything_is_released():
    """Field notes row 11: memory that a later step reads goes back to the pool, and a graph overwrites it."""
    device = Releasing(early=False)
    assert replayed_right(device)
    # a, its view, b, d and e; c is a live result, the last value an output. Those released between two segments are
    # handed over with the next one and counted there again when it takes them.
    assert device.num_released == 5 + 1


def test_release_before_the_last_reader_would_be_seen():
    """Field notes row 11: a release that comes too early shows on the simulated device."""
    assert not replayed_right(Releasing(early=True))
