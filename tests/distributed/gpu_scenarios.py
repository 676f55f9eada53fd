"""What two ranks go through together on two GPUs, with sums over NCCL inside of the graphs and between them."""

from __future__ import annotations

from typing import Any

import torch

import graphcap
from graphcap.cudagraph import Capture, device_for
from tests.cudagraph.regions import LIVE, runner_of
from tests.distributed.scenarios import Block, compiled_full, compiled_piecewise, layered, report, same_inputs, truth
from tests.distributed.two_ranks import Rank


def _layered(rank: Rank, fails_in: int = -1, collective: Capture = Capture.ALWAYS, calls: int = 8) -> dict[str, Any]:
    device, reason = device_for({rank.device}, simulate=False)
    assert device is not None, reason
    runner = runner_of(layered(rank, fails_in, collective), device, process_group=rank.group)
    right = []
    for seed in range(calls):
        inputs = same_inputs(3, seed)
        (result,) = runner(3, inputs[rank.rank].to(rank.device))
        right.append(torch.allclose(result.cpu(), truth(inputs), atol=1e-5))
    found = report(runner, rank, right)
    runner.release()
    return found


def sums_in_graphs(rank: Rank) -> dict[str, Any]:
    return _layered(rank)


def sums_between_graphs(rank: Rank) -> dict[str, Any]:
    return _layered(rank, collective=LIVE)


def failure_after_the_sums(rank: Rank) -> dict[str, Any]:
    return _layered(rank, fails_in=2)


def failure_before_the_sums(rank: Rank) -> dict[str, Any]:
    return _layered(rank, fails_in=0)


def failure_between_live_sums(rank: Rank) -> dict[str, Any]:
    return _layered(rank, fails_in=1, collective=LIVE)


def left_alive(rank: Rank) -> bool:
    """Graphs with NCCL work in them when the process comes to its end: ``reset()`` goes first, then the groups."""
    model = Block(rank).to(rank.device).eval()
    compiled = graphcap.compile(model, cudagraph_mode="FULL", process_group=rank.group, capture_sizes=[4])
    with torch.inference_mode():
        for seed in range(5):
            x = torch.randn(4, 16, generator=torch.Generator().manual_seed(seed)).to(rank.device)
            right = torch.allclose(compiled(x), model.reference(x), atol=1e-3)
    _kept.append(compiled)
    rank.all_reduce(torch.ones(1, device=rank.device))
    return right


_kept: list[Any] = []

ALL = {
    each.__name__: each
    for each in (
        sums_in_graphs, sums_between_graphs, compiled_full, compiled_piecewise, failure_between_live_sums,
        failure_after_the_sums, failure_before_the_sums, left_alive,
    )
}  # fmt: skip
