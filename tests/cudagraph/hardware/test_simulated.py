"""The simulated device keeps the rules of a capture: each test breaks one and must see it."""

from __future__ import annotations

import pytest
import torch

from graphcap.cudagraph.hardware.simulated import SimulatedDevice
from graphcap.cudagraph.hardware.simulated_recording import SimulatedCaptureError, SimulatedPool

ZEROS = torch.zeros(3)  # what is recorded refers to its arguments and does not keep them alive


@pytest.fixture
def device():
    return SimulatedDevice()


@pytest.fixture
def pool():
    return SimulatedPool()


def test_recorded_call_has_no_effect_until_replayed(device, pool):
    state = torch.zeros(2)
    recording = device.begin(pool, [])
    result, same = recording.call(lambda s: (s.add_(1) * 2, s), [state])
    segment = recording.end()
    assert torch.equal(state, torch.zeros(2))
    assert result.isnan().all()
    assert same.data_ptr() == state.data_ptr()
    segment.replay()
    assert torch.equal(state, torch.ones(2))
    assert torch.equal(result, torch.full((2,), 2.0))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64]
)
def test_values_before_the_replay_are_poison(device, pool, dtype):
    value = torch.ones(3, dtype=dtype)
    recording = device.begin(pool, [])
    (result,) = recording.call(lambda v: (v.clone(),), [value])
    segment = recording.end()
    assert not (result == value).any()
    segment.replay()
    assert torch.equal(result, value)


def test_replay_keeps_addresses_and_numbers(device, pool):
    x = torch.ones(2)
    recording = device.begin(pool, [])
    (result,) = recording.call(lambda x, k: (x * k,), [x, 3])
    segment = recording.end()
    segment.replay()
    x.fill_(2)
    segment.replay()
    assert torch.equal(result, torch.full((2,), 6.0))


def test_results_may_view_each_other(device, pool):
    recording = device.begin(pool, [])
    base, view = recording.call(lambda x: ((y := x + 1), y[1:]), [ZEROS[:3]])
    segment = recording.end()
    segment.replay()
    assert view.data_ptr() == base.data_ptr() + 4
    assert torch.equal(base, torch.ones(3))


@pytest.mark.parametrize("sync", [lambda x: x.item(), lambda x: x.nonzero(), lambda x: bool(x > 0), lambda x: x[x > 0]])
def test_waiting_for_the_device_is_refused(device, pool, sync):
    recording = device.begin(pool, [])
    with pytest.raises(SimulatedCaptureError, match="not allowed inside a graph capture"):
        recording.call(lambda x: (sync(x),), [torch.ones(1)])
    recording.abort()


def test_released_memory_is_poison_for_whoever_comes_after(device, pool):
    recording = device.begin(pool, [])
    (early,) = recording.call(lambda x: (x + 1,), [ZEROS[:2]])
    (before,) = recording.call(lambda e: (e * 2,), [early])
    recording.release(early)
    (after,) = recording.call(lambda e: (e * 2,), [early])
    segment = recording.end()
    segment.replay()
    assert torch.equal(before, torch.full((2,), 2.0))
    assert after.isnan().all()


def test_memory_released_between_segments_is_poison_in_the_next(device, pool):
    first = device.begin(pool, [])
    (early,) = first.call(lambda x: (x + 1,), [ZEROS[:2]])
    first_segment = first.end()
    first_segment.replay()
    second = device.begin(pool, [early])
    (late,) = second.call(lambda e: (e * 2,), [early])
    second_segment = second.end()
    second_segment.replay()
    assert late.isnan().all()


def test_results_are_poison_after_the_plan(device, pool):
    recording = device.begin(pool, [])
    (result,) = recording.call(lambda x: (x + 1,), [ZEROS[:2]])
    segment = recording.end()
    segment.replay()
    device.at_end([segment], ())()
    assert result.isnan().all()


def test_recording_does_not_advance_the_random_generator(device, pool):
    torch.manual_seed(0)
    recording = device.begin(pool, [])
    recording.call(lambda x: (torch.rand_like(x),), [torch.zeros(2)])
    recording.end()
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(1))


def test_indices_made_in_the_same_recording_are_usable(device, pool):
    scores, table = torch.tensor([1.0, 3.0, 2.0]), torch.arange(3)
    recording = device.begin(pool, [])
    (index,) = recording.call(lambda x: (x.argmax(),), [scores])
    (row,) = recording.call(lambda t, i: (t[None, :].index_select(1, i[None]),), [table, index])
    segment = recording.end()
    segment.replay()
    assert row.tolist() == [[1]]


def test_size_that_differs_at_replay_is_an_error(device, pool):
    sizes = [2, 3]
    recording = device.begin(pool, [])
    recording.call(lambda: (torch.ones(sizes.pop(0)),), [])
    segment = recording.end()
    with pytest.raises(SimulatedCaptureError, match="12 bytes where it made 8"):
        segment.replay()
