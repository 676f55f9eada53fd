"""What is said about a call or a batch before it is made is what comes of it, and saying it runs nothing."""

from __future__ import annotations

import torch

from graphcap.config import CUDAGraphMode
from graphcap.cudagraph import GraphKey, GraphRunner, Program
from graphcap.cudagraph.dispatch.phase import allow_capture
from tests.cudagraph.padded_regions import N, PaddedRegion
from tests.cudagraph.regions import Region, randn, runner_of

WIDTH = 3


def sized() -> Program:
    region = Region()
    n, x = region.size("n"), region.tensor("x")
    return region.returning(region.step(lambda n, x: x + n, n, x))


def counted(calls: list[int]) -> Program:
    """Doubles its rows, and notes how many there were."""
    region = PaddedRegion()
    x = region.rows("x", WIDTH)
    doubled = region.step(lambda x: calls.append(x.shape[0]) or x * 2, x)
    return region.program(doubled, sizes=[(N, WIDTH)])


def call(runner: GraphRunner, *sizes: int) -> None:
    for n in sizes:
        x = torch.randn(n, WIDTH)
        assert torch.equal(runner(n, x)[0], x * 2)


def test_the_outlook_of_a_call_is_what_comes_of_it() -> None:
    runner = runner_of(sized(), capture_sizes=[4], max_capture_size=8)
    x = randn(4)
    outlooks = []
    for _ in range(4):
        outlooks.append(runner.foresee(4, x))
        runner(4, x)
    assert outlooks == ["", "", runner.stats.plans[0], runner.stats.plans[0]]
    assert runner.stats.plans[0].replays == 2
    assert runner.foresee(9, randn(9)) == "above max_capture_size=8"
    runner.release()
    assert runner.foresee(4, x) == ""


def test_a_batch_is_told_of_its_plan_and_of_a_proof_that_lacks() -> None:
    calls: list[int] = []
    runner = runner_of(counted(calls), capture_sizes=[4, 8], max_padding_ratio=0.9)
    asked = runner.outlook
    assert not asked.has_plan(GraphKey(4))
    call(runner, 4, 4)
    assert asked.has_plan(GraphKey(4))
    assert asked.has_plan(GraphKey(3)), "it is padded to the same rung"
    assert not asked.has_plan(GraphKey(8))
    assert not asked.has_plan(GraphKey(9))
    assert not asked.lacks_proof(GraphKey(4)), "as large as its rung"
    assert asked.lacks_proof(GraphKey(3))
    call(runner, 3)
    assert not asked.lacks_proof(GraphKey(3))
    assert not asked.lacks_proof(GraphKey(2)), "what is proven is proven for each size"
    before = list(calls)
    asked.dispatch(GraphKey(3), None)
    assert runner.foresee(2, torch.randn(2, WIDTH)) is runner.stats.plans[0]
    assert calls == before, "nothing has run"


def test_one_size_shows_what_there_is_to_know_of_another() -> None:
    runner = runner_of(counted([]), capture_sizes=[4, 8], max_padding_ratio=0.9)
    asked = runner.outlook
    assert not asked.is_told_by_others(GraphKey(8)), "nobody has called yet"
    call(runner, 4, 4)
    assert asked.is_told_by_others(GraphKey(8))
    assert not asked.is_told_by_others(GraphKey(4)), "it has its plan"
    assert not asked.is_told_by_others(GraphKey(9)), "no rung serves it"


def test_what_is_decided_lasts_but_for_room_on_the_device() -> None:
    runner = runner_of(counted([]), capture_sizes=[4], max_padding_ratio=0.9)
    decision, lasts = runner.outlook.decide(GraphKey(3), None)
    assert (decision.num_tokens, lasts) == (4, True)
    with allow_capture(False):
        decision, lasts = runner.outlook.decide(GraphKey(3), None)
        assert (decision.mode, lasts) == (CUDAGraphMode.NONE, True)
        assert "not allowed" in decision.reason
