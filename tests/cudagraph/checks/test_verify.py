"""Replays compared with live runs: what is found, what is named, what happens to the call and to the step."""

from __future__ import annotations

import dataclasses
import gc
import logging
import weakref

import pytest
import torch

from graphcap.cudagraph import Capture
from graphcap.cudagraph.checks import plan_check, verify
from graphcap.cudagraph.checks.differences import TOLERANCES
from graphcap.cudagraph.dispatch.phase import allow_capture
from graphcap.cudagraph.hardware.simulated import SimulatedDevice
from tests.cudagraph.padded_regions import N, PaddedRegion
from tests.cudagraph.regions import LIVE, Region, randn, runner_of, warm


class FreezingDevice(SimulatedDevice):
    """Replays with what Python held at the recording, as a real graph does: the simulated one runs Python again."""

    def __init__(self, metadata: dict[str, float]) -> None:
        super().__init__()
        self.metadata = metadata

    def begin(self, pool, released):
        recording = super().begin(pool, released)
        call = recording.call

        def frozen_call(fn, args):
            held = dict(self.metadata)

            def frozen(*args):
                now = dict(self.metadata)
                self.metadata.update(held)
                try:
                    return fn(*args)
                finally:
                    self.metadata.update(now)

            return call(frozen, args)

        recording.call = frozen_call
        return recording


def trusting(program, **names):
    """The program with steps that are captured on trust: ``step_1=("ns::op",)``."""
    steps = (dataclasses.replace(step, unproven=names.get(step.name, ())) for step in program.steps)
    return dataclasses.replace(program, steps=tuple(steps))


def attending(metadata):
    """Piece, attention that reads a Python value and writes a cache, piece; and a second attention that is honest."""
    region = Region()
    cache, x = region.static("cache"), region.tensor("x")
    y = region.step(lambda x: x + 1, x)
    z = region.step(
        lambda c, y: c.mul_(0.5).add_(y) * metadata["scale"], cache, y, mutates=[cache], capture=Capture.FULL
    )
    w = region.step(lambda z: z * 2, z)
    v = region.step(lambda w: w - 3, w, capture=Capture.FULL)
    program = region.returning(region.step(lambda v: v + 10, v), z)
    return trusting(program, step_1=("ns::attend",), step_3=("ns::other",))


def against_live(runner, program, calls, scale=lambda call: 1.0, metadata=None):
    """Call with fresh inputs each time; every result and the cache must be those of a live run."""
    cache, expected_cache = torch.zeros(4, 3), torch.zeros(4, 3)
    for call in range(calls):
        if metadata is not None:
            metadata["scale"] = scale(call)
        x = randn(4, 3)
        expected = program.run(expected_cache, x)
        assert all(map(torch.equal, runner(cache, x), expected))
        assert torch.equal(cache, expected_cache)


def test_an_honest_operation_is_compared_once_and_then_left_alone():
    metadata = {"scale": 2.0}
    program = attending(metadata)
    runner = runner_of(program, FreezingDevice(metadata))
    seen = []
    against_live(
        runner, program, 6, scale=lambda call: seen.append(set(runner.stats.unchecked)) or 2.0, metadata=metadata
    )
    assert seen == [set(), set(), set(), {"ns::attend", "ns::other"}, set(), set()]
    assert runner.inspector.proven == {"ns::attend", "ns::other"}
    assert not runner.stats.unchecked
    assert not runner.stats.divergences
    (plan,) = runner._table.plans.values()
    assert not plan.recorded.layout.apart
    assert [
        name for name, value in plan.replay.__globals__.items() if "compared" in getattr(value, "__name__", "")
    ] == []


def test_an_operation_that_froze_a_python_value_is_named_and_runs_live(caplog):
    """Field notes row 13: an op is captured that may not be, and replays what it saw first."""
    metadata = {"scale": 1.0}
    program = attending(metadata)
    runner = runner_of(program, FreezingDevice(metadata))
    with caplog.at_level(logging.ERROR, "graphcap.cudagraph"):
        against_live(runner, program, 9, scale=lambda call: 1.0 + call, metadata=metadata)
    (divergence,) = runner.stats.divergences
    assert divergence.startswith("step_1: result 0 of a replay differs from a live run in 4 of 4 rows (0, 1, 2, 3)")
    assert divergence.endswith("captured on trust: ns::attend")
    assert [record.getMessage() for record in caplog.records] == [f"region: {divergence}"]
    (plan,) = runner.stats.plans
    assert list(plan.live) == ["step_1"]
    assert runner.inspector.proven == {"ns::other"}


def test_every_step_with_the_operation_runs_live():
    metadata = {"scale": 1.0}
    region = Region()
    x = region.tensor("x")
    y = region.step(lambda x: x * metadata["scale"], x)
    z = region.step(lambda y: y + 1, y)
    program = trusting(
        region.returning(region.step(lambda z: z * metadata["scale"], z)), step_0=("ns::a",), step_2=("ns::a",)
    )
    runner = runner_of(program, FreezingDevice(metadata))
    for call in range(8):
        metadata["scale"] = 1.0 + call
        x = randn(3)
        assert torch.equal(runner(x)[0], program.run(x)[0])
    assert list(runner.stats.plans[0].live) == ["step_0", "step_2"]


class UnsteadyDevice(FreezingDevice):
    """Replays round otherwise than live runs do, from the first captured step on."""

    def begin(self, pool, released):
        recording = super().begin(pool, released)
        call, first = recording.call, []

        def unsteady_call(fn, args):
            first.append(fn)
            if len(first) > 1:
                return call(fn, args)

            def unsteady(*args):
                results = fn(*args)
                for result in results:
                    result.mul_(1 + torch.finfo(result.dtype).eps)
                return results

            return call(unsteady, args)

        recording.call = unsteady_call
        return recording


def unsteady(metadata, depth, *, sample=False):
    """Steps of a map that doubles what rounding has left, then an operation that is captured on trust."""
    region = Region()
    x = region.tensor("x")
    y = region.step(lambda x: x * 1, x)
    for _ in range(depth):
        y = region.step(lambda y: 4 * y * (1 - y), y)
    z = region.step(lambda y: (y.mul(1e6).long() if sample else y) * metadata["scale"], y)
    return trusting(region.returning(z), **{f"step_{depth + 1}": ("ns::a",)})


def unsteady_calls(runner, metadata, scale=lambda call: 1):
    torch.manual_seed(0)
    for call in range(6):
        metadata["scale"] = scale(call)
        yield torch.rand(16, 64)


def test_values_that_rounding_moves_far_are_no_divergence():
    metadata = {"scale": 1}
    program = unsteady(metadata, 11)
    runner = runner_of(program, UnsteadyDevice(metadata))
    apart = [(runner(x)[0] - program.run(x)[0]).abs().max().item() for x in unsteady_calls(runner, metadata)]
    assert max(apart) > 5 * TOLERANCES[torch.float32]  # as a step by itself, it would have been a divergence
    assert not runner.stats.divergences
    assert runner.inspector.proven == {"ns::a"}


def test_a_frozen_value_is_found_where_rounding_moves_values_far():
    metadata = {"scale": 1}
    runner = runner_of(unsteady(metadata, 11), UnsteadyDevice(metadata))
    for x in unsteady_calls(runner, metadata, scale=lambda call: 10**call):
        runner(x)
    (divergence,) = runner.stats.divergences
    assert divergence.endswith("captured on trust: ns::a")


@pytest.mark.parametrize(("depth", "sample"), [(40, False), (11, True)], ids=["chaotic", "numbers"])
def test_what_rounding_changes_altogether_is_not_compared_and_the_report_says_so(depth, sample):
    metadata = {"scale": 1}
    runner = runner_of(unsteady(metadata, depth, sample=sample), UnsteadyDevice(metadata))
    for x in unsteady_calls(runner, metadata):
        runner(x)
    assert not runner.stats.divergences
    assert "rounding alone changes result 0" in runner.stats.unchecked["ns::a"]
    assert list(runner.stats.plans[0].live) == []


def two_in_one_graph(metadata, **trusted):
    region = Region()
    x = region.tensor("x")
    y = region.step(lambda x: x + 1, x)
    z = region.step(lambda y: y * metadata["scale"], y)
    return trusting(region.returning(region.step(lambda z: z - 2, z)), **trusted)


def test_of_two_operations_in_one_graph_the_guilty_one_is_found():
    metadata = {"scale": 1.0}
    program = two_in_one_graph(metadata, step_0=("ns::a",), step_1=("ns::b",))
    runner = runner_of(program, FreezingDevice(metadata))
    segments = []
    for call in range(10):
        metadata["scale"] = 1.0 + call
        x = randn(3)
        assert torch.equal(runner(x)[0], program.run(x)[0])
        segments.append([plan.num_segments for plan in runner.stats.plans])
    first, second = runner.stats.divergences
    assert first.endswith("captured on trust: one of ns::a, ns::b")
    assert second.startswith("step_1: ")
    assert second.endswith("captured on trust: ns::b")
    assert list(runner.stats.plans[0].live) == ["step_1"]
    assert runner.inspector.proven == {"ns::a"}
    assert segments == [[], [], [1], [], [3], [], [2], [2], [2], [2]]


def test_a_suspect_is_not_cleared_by_agreeing_once():
    """What it froze is right as long as nobody changes it: the second capture froze the new value."""
    metadata = {"scale": 1.0}
    program = two_in_one_graph(metadata, step_0=("ns::a",), step_1=("ns::b",))
    runner = runner_of(program, FreezingDevice(metadata))
    for scale in (1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 3.0, 3.0, 4.0):
        metadata["scale"] = scale
        x = randn(3)
        assert torch.equal(runner(x)[0], program.run(x)[0])
    assert runner.stats.divergences[-1].endswith("captured on trust: ns::b")
    assert list(runner.stats.plans[0].live) == ["step_1"]


def test_where_no_suspect_shows_itself_again_all_of_them_run_live(monkeypatch):
    monkeypatch.setattr(verify, "_TRIALS", 3)
    metadata = {"scale": 1.0}
    program = two_in_one_graph(metadata, step_0=("ns::a",), step_1=("ns::b",))
    runner = runner_of(program, FreezingDevice(metadata))
    for call in range(10):
        metadata["scale"] = 1.0 if call < 3 else 2.0
        x = randn(3)
        assert torch.equal(runner(x)[0], program.run(x)[0])
    assert len(runner.stats.divergences) == 1
    assert runner.stats.plans[0].live == dict.fromkeys(["step_0", "step_1"], runner.stats.divergences[0])
    assert runner.inspector.proven == set()


def test_two_operations_in_one_step_are_both_suspected():
    metadata = {"scale": 1.0}
    program = two_in_one_graph(metadata, step_1=("ns::a", "ns::b"))
    runner = runner_of(program, FreezingDevice(metadata))
    for call in range(6):
        metadata["scale"] = 1.0 + call
        runner(randn(3))
    (divergence,) = runner.stats.divergences
    assert divergence.endswith("captured on trust: one of ns::a, ns::b")
    assert list(runner.stats.plans[0].live) == ["step_1"]


def test_a_sealed_process_has_all_suspects_run_live_at_once():
    metadata = {"scale": 1.0}
    program = two_in_one_graph(metadata, step_0=("ns::a",), step_1=("ns::b",))
    runner = runner_of(program, FreezingDevice(metadata))
    warm(runner, randn(3))
    with allow_capture(False):
        for call in range(4):
            metadata["scale"] = 2.0 + call
            x = randn(3)
            assert torch.equal(runner(x)[0], program.run(x)[0])
    assert len(runner.stats.divergences) == 1
    for _ in range(2):
        runner(randn(3))
    assert list(runner.stats.plans[0].live) == ["step_0", "step_1"]


def test_a_call_with_the_inputs_of_the_capture_does_not_use_up_the_check():
    metadata = {"scale": 1.0}
    region = Region()
    x = region.tensor("x")
    program = trusting(region.returning(region.step(lambda x: x * metadata["scale"], x)), step_0=("ns::a",))
    runner = runner_of(program, FreezingDevice(metadata))
    same = randn(3)
    for _ in range(7):
        runner(same)
    assert runner.stats.replays == 4
    assert runner.inspector.proven == set()
    assert runner.stats.unchecked == {"ns::a": "no replay had other inputs than the capture yet"}
    metadata["scale"] = 5.0
    x = randn(3)
    assert torch.equal(runner(x)[0], x * 5)
    assert runner.stats.divergences


def test_an_input_that_rarely_changes_is_looked_at_rarely_in_the_long_run(monkeypatch):
    looks = []
    honest = plan_check.same_bits
    monkeypatch.setattr(plan_check, "same_bits", lambda *tensors: looks.append(1) or honest(*tensors))
    region = Region()
    x = region.tensor("x")
    program = trusting(region.returning(region.step(lambda x: x * 2, x)), step_0=("ns::a",))
    runner = runner_of(program)
    same = randn(3)
    for _ in range(3 + 64 + 32):
        runner(same)
    assert len(looks) == 16 + 2, "and the 32nd and the 64th"


def test_pieces_that_nobody_vouched_for_are_not_compared():
    runner = runner_of(attending({"scale": 1.0}), cudagraph_mode="PIECEWISE")
    warm(runner, torch.zeros(4, 3), randn(4, 3))
    runner(torch.zeros(4, 3), randn(4, 3))
    assert not runner.stats.unchecked
    assert runner.inspector.proven == set()


def test_state_that_is_too_large_to_copy_is_not_compared_and_the_report_says_so(monkeypatch):
    monkeypatch.setattr(FreezingDevice, "spare_bytes", lambda device: 8)
    metadata = {"scale": 1.0}
    program = attending(metadata)
    runner = runner_of(program, FreezingDevice(metadata))
    against_live(runner, program, 5)
    assert set(runner.stats.unchecked) == {"ns::attend", "ns::other"}
    assert "it writes into" in runner.stats.unchecked["ns::attend"]
    assert not runner.stats.divergences


def test_verify_gives_each_step_a_graph_of_its_own_and_compares_all(monkeypatch):
    compared = []
    honest = plan_check.difference
    monkeypatch.setattr(plan_check, "difference", lambda *tensors: compared.append(1) or honest(*tensors))
    program = attending({"scale": 1.0})
    runner = runner_of(program, verify=True)
    against_live(runner, program, 5)
    assert runner.stats.plans[0].num_segments == 5
    assert len(compared) == 2 * (5 + 1)  # five results and what was written into the cache, in two replays
    assert not runner.stats.divergences


def test_verify_returns_the_live_result_and_names_the_first_step_that_differs():
    metadata = {"scale": 1.0, "shift": 0.0}
    region = Region()
    state, x = region.static("state"), region.tensor("x")
    y = region.step(lambda x: x + 1, x)
    z = region.step(lambda s, y: s.add_(y * metadata["scale"]), state, y, mutates=[state])
    program = region.returning(region.step(lambda z: z.cumsum(0), z))
    runner = runner_of(program, FreezingDevice(metadata), verify=True)
    state, expected_state = torch.zeros(4, 2), torch.zeros(4, 2)
    for call in range(8):
        metadata["scale"] = 1.0 if call < 4 else 3.0
        x = randn(4, 2)
        x[0] = -1  # row 0 adds nothing
        expected = program.run(expected_state, x)
        assert torch.equal(runner(state, x)[0], expected[0])
        assert torch.equal(state, expected_state)
    (divergence,) = runner.stats.divergences
    assert divergence.startswith("step_1: result 0 of a replay differs from a live run in 3 of 4 rows (1, 2, 3)")
    assert list(runner.stats.plans[0].live) == ["step_1"]


def test_verify_of_a_number_compares_so_many_replays_and_then_captures_without_cuts():
    region = Region()
    x = region.tensor("x")
    y = region.step(lambda x: x + 1, x)
    program = region.returning(region.step(lambda y: y * 2, y))
    runner = runner_of(program, verify=2)
    segments = []
    for _ in range(8):
        x = randn(3)
        assert torch.equal(runner(x)[0], (x + 1) * 2)
        segments.append([plan.num_segments for plan in runner.stats.plans])
    assert segments == [[], [], [2], [2], [], [1], [1], [1]]


def test_a_sealed_process_keeps_the_plan_that_was_verified():
    region = Region()
    x = region.tensor("x")
    y = region.step(lambda x: x + 1, x)
    runner = runner_of(region.returning(region.step(lambda y: y * 2, y)), verify=2)
    warm(runner, randn(3))
    with allow_capture(False):
        for _ in range(4):
            runner(randn(3))
    assert runner.stats.replays == 4
    assert runner.stats.plans[0].num_segments == 2


def test_random_numbers_are_drawn_once():
    region = Region()
    x = region.tensor("x")
    program = region.returning(region.step(lambda x: x + torch.rand(3), x))
    runner = runner_of(program, verify=True)
    torch.manual_seed(0)
    got = [runner(torch.zeros(3))[0] for _ in range(6)]
    torch.manual_seed(0)
    expected = [program.run(torch.zeros(3))[0] for _ in range(6)]
    assert all(map(torch.equal, got, expected))
    assert not runner.stats.divergences


def test_state_that_is_copied_in_and_out_is_put_right():
    metadata = {"scale": 1.0}
    region = Region()
    state, x = region.tensor("state"), region.tensor("x")
    program = trusting(
        region.returning(region.step(lambda s, x: s.add_(x * metadata["scale"]) * 1, state, x, mutates=[state])),
        step_0=("ns::a",),
    )
    runner = runner_of(program, FreezingDevice(metadata))
    kept = []
    for call in range(12):
        metadata["scale"] = 1.0 + call
        state, expected_state, x = torch.ones(3), torch.ones(3), randn(3)
        kept.append(state)  # keeps moving
        expected = program.run(expected_state, x)
        assert torch.equal(runner(state, x)[0], expected[0])
        assert torch.equal(state, expected_state)
    assert runner.stats.divergences


def test_a_live_step_runs_once_in_a_compared_replay():
    calls = []
    region = Region()
    x = region.tensor("x")
    y = region.step(lambda x: x + 1, x)
    z = region.step(lambda y: calls.append(1) or y * 2, y, capture=LIVE)
    program = region.returning(region.step(lambda z: z - 1, z))
    runner = runner_of(program, verify=True)
    for _ in range(5):
        runner(randn(2))
    assert len(calls) == 5


def test_a_dropped_plan_does_not_wait_for_the_collector():
    region = Region()
    x = region.tensor("x")
    program = trusting(region.returning(region.step(lambda x: x * 2, x)), step_0=("ns::a",))
    runner = runner_of(program)
    warm(runner, randn(3))
    (plan,) = runner._table.plans.values()
    replay = weakref.ref(plan.replay)
    gc.disable()
    try:
        del plan
        runner.release()
        assert replay() is None
    finally:
        gc.enable()


def test_a_comparison_that_fails_leaves_the_replay_alone():
    region = Region()
    x = region.tensor("x")
    broken = []

    def sometimes(x):
        if broken and not torch._C._len_torch_dispatch_stack():
            broken.append(1)
            if len(broken) == 2:
                raise ZeroDivisionError("only when run live")
        return x * 2

    program = trusting(region.returning(region.step(sometimes, x)), step_0=("ns::a",))
    runner = runner_of(program)
    warm(runner, randn(3))
    broken.append(1)
    x = randn(3)
    assert torch.equal(runner(x)[0], x * 2)
    assert runner.stats.unchecked == {"ns::a": "ZeroDivisionError: only when run live"}


def padded(metadata):
    """Row-wise steps over ``[n, 3]``, padded to a rung; the second reads a Python value."""
    region = PaddedRegion()
    x = region.rows("x", 3)
    y = region.step(lambda x: x + 1, x)
    z = region.step(lambda y: y * metadata["scale"], y, capture=Capture.FULL)
    return region.program(region.step(lambda z: z - 3, z), sizes=[(N, 3)])


@pytest.mark.parametrize("settings", [{}, {"verify": True}], ids=["trusted", "verify"])
def test_a_padded_replay_is_compared_and_put_right_like_any_other(settings):
    metadata = {"scale": 1.0}
    program = trusting(padded(metadata), step_1=("ns::a",))
    runner = runner_of(program, FreezingDevice(metadata), capture_sizes=[8], **settings)
    for call, n in enumerate([5, 5, 5, 5, 7, 8, 5, 6, 7, 5]):
        metadata["scale"] = 1.0 if call < 3 else 2.0
        x = randn(n, 3)
        assert torch.equal(runner(n, x)[0], program.run(n, x)[0])
    assert runner.stats.replays >= 5
    (divergence,) = runner.stats.divergences
    assert divergence.endswith("captured on trust: ns::a")
    assert list(runner.stats.plans[0].live) == ["step_1"]


@pytest.mark.parametrize("settings", [{}, {"verify": True}, {"verify": 2}], ids=["trusted", "verify", "verify two"])
def test_an_honest_padded_plan_agrees_at_every_size(settings):
    program = trusting(padded({"scale": 2.0}), step_1=("ns::a",))
    runner = runner_of(program, capture_sizes=[8], **settings)
    for n in [5, 5, 5, 5, 7, 8, 5, 6, 7, 5]:
        x = randn(n, 3)
        assert torch.equal(runner(n, x)[0], program.run(n, x)[0])
    assert not runner.stats.divergences
    assert not runner.stats.unchecked
    assert [plan.num_segments for plan in runner.stats.plans] == [3 if settings.get("verify") is True else 1]


@pytest.mark.parametrize(("annotate", "called"), [(False, "replay"), (True, "named")])
def test_replays_of_other_sizes_pay_nothing_for_a_check_that_is_over(annotate, called):
    program = trusting(padded({"scale": 2.0}), step_1=("ns::a",))
    runner = runner_of(program, capture_sizes=[8], annotate=annotate)
    for n in (8, 8, 5, 5, 8):  # the first replay, which is compared, is that of a smaller size
        runner(n, randn(n, 3))
    assert runner.inspector.proven == {"ns::a"}
    served = runner._table.served
    assert [each.size.size for each in served.values()] == [(5,), (8,)]
    assert [each.replay.__globals__["g0"].__name__ for each in served.values()] == [called] * 2


@pytest.mark.gpu
def test_a_python_value_in_a_real_graph_is_found():
    metadata = {"scale": 1.0}
    program = attending(metadata)
    from graphcap.cudagraph.hardware.cuda import CudaDevice

    runner = runner_of(program, CudaDevice(0))
    cache, expected_cache = (torch.zeros(4, 3, device="cuda") for _ in range(2))
    for call in range(8):
        metadata["scale"] = 1.0 + call
        x = torch.randn(4, 3, device="cuda")
        expected = program.run(expected_cache, x)
        for mine, theirs in zip(runner(cache, x), expected, strict=True):
            torch.testing.assert_close(mine, theirs)
        torch.testing.assert_close(cache, expected_cache)
    assert "ns::attend" in runner.stats.divergences[0]
    assert list(runner.stats.plans[0].live) == ["step_1"]


@pytest.mark.gpu
def test_random_numbers_of_a_real_graph_are_those_of_a_live_run():
    from graphcap.cudagraph.hardware.cuda import CudaDevice

    region = Region()
    x = region.tensor("x")
    y = region.step(lambda x: x + torch.rand(64, device="cuda"), x)
    program = region.returning(region.step(lambda y: torch.nn.functional.dropout(y, 0.5), y))
    runner = runner_of(program, CudaDevice(0), verify=True)
    for _ in range(6):
        runner(torch.zeros(64, device="cuda"))
    assert not runner.stats.divergences
    assert runner.stats.replays == 3
