"""num_warmups=0: a size is recorded at once where another one of its kind has been, and warmed up when that fails."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphcap.cudagraph import GraphRunner, Program
from graphcap.cudagraph.dispatch.phase import Phase, in_phase
from graphcap.cudagraph.dispatch.step import current_step, step
from tests.cudagraph.padded_regions import LIVE, N, PaddedRegion
from tests.cudagraph.regions import runner_of

WIDTH = 4


def runner_without_warm_ups(program: Program, **settings: Any) -> GraphRunner:
    return runner_of(program, capture_sizes=[2, 4, 8], num_warmups=0, **settings)


def call(runner: GraphRunner, size: int, phase: Phase = Phase.RECORD) -> bool:
    """Whether the call came to a plan; its result is right."""
    x, before = torch.randn(size, WIDTH), len(runner.stats.plans)
    with in_phase(phase):
        (got,) = runner(size, x)
    torch.testing.assert_close(got, x * 2 + 1, rtol=0, atol=0)
    return len(runner.stats.plans) > before


class Kernels:
    """A step that has something to do at the first sight of each size, which a graph cannot hold."""

    def __init__(self) -> None:
        self.prepared: set[int] = set()

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) not in self.prepared:
            x.sum().item()
            self.prepared.add(len(x))
        return x * 2


def doubling(first: Any = lambda x: x * 2) -> Program:
    region = PaddedRegion()
    doubled = region.step(first, region.rows("x", WIDTH))
    return region.program(region.step(lambda d: d + 1, doubled), sizes=[(N, WIDTH)])


def test_the_first_size_is_warmed_up_and_no_other_one() -> None:
    runner = runner_without_warm_ups(doubling())
    assert [call(runner, 8), call(runner, 8)] == [False, True]
    assert call(runner, 4)
    assert call(runner, 2)
    assert not runner.stats.failures
    for size in (8, 4, 2):
        assert not call(runner, size, Phase.TRAFFIC)
    assert runner.stats.replays == 3


def test_a_step_that_needs_a_warm_up_gets_one_and_is_not_blamed() -> None:
    kernels = Kernels()
    runner = runner_without_warm_ups(doubling(kernels))
    assert [call(runner, 8), call(runner, 8)] == [False, True]
    assert [call(runner, 4) for _ in range(3)] == [False, False, True], "tried, warmed up, captured"
    assert [call(runner, 2) for _ in range(2)] == [False, True], "not tried again"
    assert not runner.stats.failures
    assert all(len(plan.captured) == 2 for plan in runner.stats.plans)


def test_a_step_that_fails_after_its_warm_up_is_blamed() -> None:
    fails = [False]

    def step_of_some_sizes(x: Tensor) -> Tensor:
        if fails[0]:
            x.sum().item()
        return x * 2

    runner = runner_without_warm_ups(doubling(step_of_some_sizes))
    assert [call(runner, 8), call(runner, 8)] == [False, True]
    fails[0] = True
    for _ in range(5):
        call(runner, 4)
    assert len(runner.stats.failures) == 1


def test_a_warm_up_that_somebody_asks_for_is_one() -> None:
    runner = runner_without_warm_ups(doubling())
    assert [call(runner, 8), call(runner, 8)] == [False, True]
    assert not call(runner, 4, Phase.WARM_UP)
    assert call(runner, 4)


def test_inputs_of_the_step_have_their_buffers() -> None:
    region = PaddedRegion()
    x = region.rows("x", WIDTH)
    scaled = region.step(lambda x: x * current_step().inputs["lens"][:, None], x)
    attended = region.step(lambda s: s + current_step().inputs["lens"][:, None], scaled, capture=LIVE)
    runner = runner_without_warm_ups(
        region.program(attended, sizes=[(N, WIDTH)]), dynamic_arg_dims={"step.lens": {0: "n"}}
    )
    for size in (8, 8, 4, 2, 8, 4, 2):
        x_, lens = torch.randn(size, WIDTH), torch.arange(size)
        with step(num_tokens=size, inputs={"lens": lens}), in_phase(Phase.RECORD):
            (got,) = runner(size, x_)
        torch.testing.assert_close(got, x_ * lens[:, None] + lens[:, None])
    assert not runner.stats.failures
    assert len(runner.stats.plans) == 3
    assert runner.stats.replays == 3
