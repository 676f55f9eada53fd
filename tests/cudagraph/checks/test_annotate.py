"""Names of pieces in a trace."""

from __future__ import annotations

import torch

from tests.cudagraph.regions import LIVE, Region, randn, runner_of, warm


def three_steps():
    region = Region()
    x = region.tensor("x")
    y = region.step(lambda x: x + 1, x)
    z = region.step(lambda y: y * 2, y)
    w = region.step(lambda z: z.sum(0), z, capture=LIVE)
    return region.returning(region.step(lambda w: w - 3, w))


def names_in_trace(runner):
    with torch.profiler.profile() as trace:
        runner(randn(3))
    return [event.name for event in trace.events() if event.name.startswith("region: ")]


def test_segments_and_live_steps_are_named_in_the_order_in_which_they_run():
    runner = runner_of(three_steps(), annotate=True)
    warm(runner, randn(3))
    assert names_in_trace(runner) == ["region: step_0 to step_1", "region: step_2", "region: step_3"]


def test_nothing_is_put_around_a_replay_that_is_not_annotated():
    runner = runner_of(three_steps())
    warm(runner, randn(3))
    assert names_in_trace(runner) == []
    (plan,) = runner._table.plans.values()
    names = plan.replay.__globals__
    assert names["g0"] == plan.recorded.segments[0].replay
    assert names["live2"] is plan.recorded.program.steps[2].fn


def test_annotated_and_compared_at_once():
    runner = runner_of(three_steps(), annotate=True, verify=True)
    warm(runner, randn(3))
    x = randn(3)
    assert torch.equal(runner(x)[0], ((x + 1) * 2).sum(0) - 3)
    assert names_in_trace(runner) == [f"region: step_{number}" for number in range(4)]
