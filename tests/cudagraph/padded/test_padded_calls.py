"""Padding as callers see it: runners that pad to a ladder, prove it first, and refuse what mixes rows."""

from __future__ import annotations

import dataclasses
import logging
import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphcap.cudagraph import GraphKey, GraphRunner, Program, Size
from graphcap.cudagraph.dispatch.phase import Phase, allow_capture, in_phase
from graphcap.cudagraph.dispatch.step import current_step, step
from tests.cudagraph.padded_regions import LIVE, N, PaddedRegion
from tests.cudagraph.regions import runner_of

WIDTH = 3


def rows(num_rows: int) -> torch.Tensor:
    return torch.randn(num_rows, WIDTH)


def row_wise(live: bool = False) -> Program:
    region = PaddedRegion()
    x = region.rows("x", WIDTH)
    doubled = region.step(lambda x: x * 2, x)
    attended = region.step(lambda d: d + 1, doubled, **({"capture": LIVE} if live else {}))
    return region.program(region.step(lambda a: a - 3, attended), sizes=[(N, WIDTH)])


def mixing() -> Program:
    region = PaddedRegion()
    x = region.rows("x", WIDTH)
    return region.program(region.step(lambda x: x - x.mean(0), x), sizes=[(N, WIDTH)])


def call(runner: GraphRunner, n: int) -> torch.Tensor:
    x = rows(n)
    (out,) = runner(n, x)
    (expected,) = runner.program.run(n, x)
    torch.testing.assert_close(out, expected)
    assert out.is_contiguous()
    return out


def counters(runner: GraphRunner) -> tuple[int, int, int]:
    return len(runner.stats.plans), runner.stats.replays, runner.stats.live_calls.total()


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("outputs", ["clone", "static", "ring:2"])
def test_one_rung_serves_every_smaller_size(live: bool, outputs: str) -> None:
    runner = runner_of(row_wise(live), capture_sizes=[8], outputs=outputs)
    for n in (5, 5, 5, 5):
        call(runner, n)
    assert counters(runner) == (1, 1, 2), "seen, proven, captured, replayed"
    for n in (4, 8, 7, 5, 6, 4):
        call(runner, n)
    assert counters(runner) == (1, 7, 2)
    (plan,) = runner.stats.plans
    assert plan.key == (8,)


def test_too_much_padding_is_an_exact_shape_of_its_own() -> None:
    runner = runner_of(row_wise(), capture_sizes=[8], max_padding_ratio=0.5, capture_after=2)
    for _ in range(4):
        call(runner, 3)
    (plan,) = runner.stats.plans
    assert plan.key == (3,)


def test_beyond_the_ladder_calls_run_live() -> None:
    runner = runner_of(row_wise(), capture_sizes=[8])
    for _ in range(6):
        call(runner, 9)
    assert counters(runner) == (0, 0, 6)
    assert list(runner.stats.live_calls) == ["above the ladder, which ends at 8"]


def test_the_default_ladder_serves_declared_dims() -> None:
    runner = runner_of(row_wise())
    for _ in range(4):
        call(runner, 19)
    (plan,) = runner.stats.plans
    assert plan.key == (24,)


def test_rows_that_are_mixed_are_never_padded(caplog: pytest.LogCaptureFixture) -> None:
    runner = runner_of(mixing(), capture_sizes=[8], capture_after=2)
    with caplog.at_level(logging.WARNING, "graphcap.cudagraph"):
        for _ in range(6):
            call(runner, 5)
    (plan,) = runner.stats.plans
    assert plan.key == (5,), "the exact shape, after its own sightings"
    assert len(caplog.records) == 1
    assert "step_0" in caplog.text
    assert any("is not padded" in note for note in runner.padding.notes)


def test_a_refusal_after_the_rung_was_captured_leaves_that_rung_alone() -> None:
    runner = runner_of(mixing(), capture_sizes=[8], capture_after=2)
    for _ in range(3):
        call(runner, 8)
    for _ in range(4):
        call(runner, 5)
    call(runner, 8)
    assert sorted(plan.key for plan in runner.stats.plans) == [(5,), (8,)]


def test_effects_of_padded_calls_happen_once() -> None:
    region = PaddedRegion()
    x, slots, cache = region.rows("x", WIDTH), region.rows("slots", index=True), region.state("cache", 16, WIDTH)

    def append(cache: torch.Tensor, slots: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        kept = slots >= 0
        at = slots.clamp(min=0)
        cache.index_put_((at,), torch.where(kept[:, None], cache[at] + x, torch.zeros(())), accumulate=False)
        return x * 1

    program = region.program(region.step(append, cache, slots, x, mutates=[cache], capture=LIVE), sizes=[(N, WIDTH)])
    runner = runner_of(program, capture_sizes=[8], pad={"slots": -1})
    mine, theirs = torch.zeros(16, WIDTH), torch.zeros(16, WIDTH)
    for n in (5, 5, 5, 6, 4, 8):
        x_, slots_ = rows(n), torch.randperm(15)[:n] + 1
        runner(n, x_, slots_, mine)
        program.run(n, x_, slots_, theirs)
        torch.testing.assert_close(mine[1:], theirs[1:])


def test_sizes_between_two_rungs_in_any_order() -> None:
    runner = runner_of(row_wise(), capture_sizes=[2, 4, 8])
    with torch.no_grad():
        for size in (8, 4, 2):
            for phase in (Phase.WARM_UP, Phase.RECORD):
                with in_phase(phase):
                    call(runner, size)
    call(runner, 7)  # the proof
    with allow_capture(False):
        for n in (7, 1, 3, 2, 8, 5, 4, 6, 1, 3):
            call(runner, n)
    assert counters(runner)[:2] == (3, 10)


@settings(max_examples=10, deadline=None)
@given(sizes=st.lists(st.integers(1, 12), min_size=4, max_size=25), live=st.booleans())
def test_any_traffic_is_what_it_is_live(sizes: list[int], live: bool) -> None:
    runner = runner_of(row_wise(live), capture_sizes=[2, 4, 8])
    for n in sizes:
        call(runner, n)
    assert not runner.stats.failures


def test_dispatch_tells_the_padded_size_before_the_call() -> None:
    """Field notes row 15: padding is decided after the metadata was built."""
    runner = runner_of(row_wise(), capture_sizes=[4, 8])
    decision = runner.outlook.dispatch(GraphKey(5), None)
    assert (decision.mode.name, decision.num_tokens) == ("FULL", 8)
    assert runner.outlook.dispatch(GraphKey(9), None).reason == "above the ladder, which ends at 8"


def test_a_decision_may_ask_for_a_larger_rung() -> None:
    """Data-parallel ranks agree on the largest of their sizes."""
    runner = runner_of(row_wise(), capture_sizes=[4, 8])
    decision = runner.outlook.dispatch(GraphKey(7), None)
    for _ in range(4):
        x = rows(3)
        with step(num_tokens=3, dispatch=decision):
            (out,) = runner(3, x)
        torch.testing.assert_close(out, x * 2 + 1 - 3)
    (plan,) = runner.stats.plans
    assert plan.key == (8,)


def test_inputs_of_the_step_are_padded_with_the_call() -> None:
    """Metadata that is no argument: the op reads it at the padded size in a padded call, at the real one otherwise."""
    seen: list[list[int]] = []
    region = PaddedRegion()
    x = region.rows("x", WIDTH)

    def attend(x: torch.Tensor) -> torch.Tensor:
        lens = current_step().inputs["lens"]
        seen.append(lens.tolist())
        assert len(lens) == len(x)
        return x * lens[:, None]

    program = region.program(region.step(attend, region.step(lambda x: x + 1, x), capture=LIVE), sizes=[(N, WIDTH)])
    runner = runner_of(
        program,
        capture_sizes=[4],
        dynamic_arg_dims={"step.lens": {0: "n"}},
        pad={"step.lens": 0},
    )
    for lens in ([1, 2, 3], [4, 5, 6], [7, 8, 9], [3, 2, 1], [9, 9]):
        n, x_ = len(lens), rows(len(lens))
        with step(num_tokens=n, inputs={"lens": torch.tensor(lens)}):
            (out,) = runner(n, x_)
        torch.testing.assert_close(out, (x_ + 1) * torch.tensor(lens)[:, None])
    assert counters(runner)[:2] == (1, 2), (runner.padding.notes, runner.stats)
    assert seen[-2:] == [[3, 2, 1, 0], [9, 9, 0, 0]]


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("pattern", [[0] * 5 + [1] * 5, [1] * 5 + [0] * 5, [0, 1] * 5, [1, 0] * 5])
def test_steps_that_bring_an_input_only_at_times(pattern: list[int], live: bool) -> None:
    """An op that goes another way without it. A plan is good for one of the two: its graphs, or its padded inputs."""
    went: list[str] = []

    def attend(x: torch.Tensor) -> torch.Tensor:
        found = current_step().inputs.get("lens")
        went.append("with" if found is not None else "without")
        return x - 1 if found is None else x * found[:, None]

    region = PaddedRegion()
    x = region.rows("x", WIDTH)
    y = region.step(attend, region.step(lambda x: x + 1, x), **({"capture": LIVE} if live else {}))
    program = region.program(region.step(lambda y: y * 2, y), sizes=[(N, WIDTH)])
    steps = [dataclasses.replace(each, unproven=() if live else ("ns::attend",)) for each in program.steps[1:2]]
    program = dataclasses.replace(program, steps=(program.steps[0], *steps, program.steps[2]))
    runner = runner_of(program, capture_sizes=[4], dynamic_arg_dims={"step.lens": {0: "n"}})
    for has_input in pattern:
        x_, lens, served = rows(3), torch.tensor([1, 2, 3]), runner.stats.replays
        with step(num_tokens=3, inputs={"lens": lens} if has_input else None):
            (out,) = runner(3, x_)
        torch.testing.assert_close(out, ((x_ + 1) * lens[:, None] if has_input else x_) * 2)
        assert went[-1] == ("with" if has_input else "without")
        if runner.stats.replays > served:
            assert has_input == pattern[0], "the plan is of such a step"


def test_a_live_step_looks_for_what_it_likes() -> None:
    """It looks again on every call: a plan made for batches with prompts serves those without."""

    def attend(x: torch.Tensor) -> torch.Tensor:
        found = current_step().inputs.get("prompts", [])
        return x + len(found)

    region = PaddedRegion()
    x = region.rows("x", WIDTH)
    program = region.program(region.step(attend, region.step(lambda x: x * 2, x), capture=LIVE), sizes=[(N, WIDTH)])
    runner = runner_of(program, capture_sizes=[4], dynamic_arg_dims={"step.lens": {0: "n"}})
    for call in range(12):
        x_, prompts = rows(3), [(0, 0, 2)] * (call % 3)
        with step(num_tokens=3, inputs={"prompts": prompts} if prompts else {"others": 1}):
            (out,) = runner(3, x_)
        torch.testing.assert_close(out, x_ * 2 + len(prompts))
    (plan,) = runner.stats.plans
    assert plan.replays >= 6
    assert runner.stats.live_calls.keys() <= {"warm-up"}


def test_inputs_of_the_step_after_a_release() -> None:
    """The buffers of the plan went with it; a warm-up makes new ones."""
    region = PaddedRegion()
    x = region.rows("x", WIDTH)
    scaled = region.step(lambda x: x * current_step().inputs["lens"][:, None], x)
    runner = runner_of(
        region.program(scaled, sizes=[(N, WIDTH)]), capture_sizes=[4], dynamic_arg_dims={"step.lens": {0: "n"}}
    )
    for call in range(12):
        x_, lens = rows(3), torch.arange(3) + call
        with step(num_tokens=3, inputs={"lens": lens}):
            (out,) = runner(3, x_)
        torch.testing.assert_close(out, x_ * lens[:, None])
        if call == 5:
            runner.release()
    (plan,) = runner.stats.plans
    assert plan.replays >= 3


def test_a_warm_up_keeps_the_inputs_of_its_step() -> None:
    """The buffers that ops read are those of the route, and another thread may be on it."""
    reading, overwritten, failures = threading.Event(), threading.Event(), list[BaseException]()

    def attend(x: torch.Tensor) -> torch.Tensor:
        lens = current_step().inputs["lens"]
        if threading.current_thread() is first and not reading.is_set():
            reading.set()
            overwritten.wait(0.2)  # nobody gets that far meanwhile
        elif reading.is_set():
            overwritten.set()
        return x * lens[:, None]

    region = PaddedRegion()
    x = region.rows("x", WIDTH)
    program = region.program(region.step(attend, x, capture=LIVE), sizes=[(N, WIDTH)])
    runner = runner_of(program, capture_sizes=[4], dynamic_arg_dims={"step.lens": {0: "n"}})

    def serve(value: int) -> None:
        try:
            x_, lens = rows(4), torch.full((4,), value)
            with torch.no_grad(), step(num_tokens=4, inputs={"lens": lens}), in_phase(Phase.WARM_UP):
                (out,) = runner(4, x_)
            torch.testing.assert_close(out, x_ * value)
        except BaseException as error:
            failures.append(error)

    first, second = (threading.Thread(target=serve, args=(value,)) for value in (2, 3))
    first.start()
    assert reading.wait(60)
    second.start()
    for thread in (first, second):
        thread.join(60)
    assert not failures


def test_sizes_that_follow_the_declared_one_are_padded_along() -> None:
    region = PaddedRegion()
    x, starts = region.rows("x", WIDTH), region.rows("starts", size=Size("n", 1, 1))
    program = region.program(region.step(lambda x, starts: x * starts.diff()[:, None], x, starts), sizes=[(N, WIDTH)])
    runner = runner_of(program, capture_sizes=[4], pad={"starts": "edge"})
    for n in (3, 3, 3, 2, 4, 3):
        x_, starts_ = rows(n), torch.randint(1, 5, (n + 1,)).cumsum(0)
        (out,) = runner(n, x_, starts_)
        torch.testing.assert_close(out, x_ * starts_.diff()[:, None])
    assert counters(runner)[:2] == (1, 3)


def call_of(runner: GraphRunner, n: int, **more: Any) -> torch.Tensor:
    with step(num_tokens=n, **more):
        return call(runner, n)


def test_tags_have_rungs_of_their_own() -> None:
    runner = runner_of(row_wise(), capture_sizes=[4], specialize_tags=["lora"])
    for _ in range(4):
        call_of(runner, 3, tags={"lora": 0})
        call_of(runner, 3, tags={"lora": 1})
    assert len(runner.stats.plans) == 2
