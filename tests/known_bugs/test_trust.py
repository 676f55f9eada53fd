"""Bugs of what nobody looks at: who is captured, what a replay costs, which mode was chosen, what is counted."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.library import custom_op

import graphcap
from graphcap.cudagraph.hardware import hooks
from tests.cudagraph.regions import LIVE, Region, randn, runner_of, warm
from tests.known_bugs.models import WIDTH, Beside, Mlp, repeated, rows

factor = [1.0]


@custom_op("known_bugs::scale", mutates_args=())
def scale(x: Tensor) -> Tensor:
    """Reads what no argument shows."""
    return x * factor[0]


@scale.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(scale(self.inner(x)))


@pytest.mark.parametrize("mode", ["AUTO", "FULL", "FULL_AND_PIECEWISE", "PIECEWISE"])
def test_an_op_that_nobody_declared_runs_live_in_every_mode(mode: str) -> None:
    """Field notes row 13: FULL takes an attention op that reads Python state, and replays its first metadata."""
    both = Beside(Scaled(), {"x": 0}, cudagraph_mode=mode, capture_sizes=[4])
    for call in range(6):
        factor[0] = 1.0 + call
        with graphcap.step(num_tokens=4, num_reqs=4, uniform_query_len=1):
            both(rows(4))
    (plan,) = both.plans
    assert list(plan.live) == ["piece_1"]
    assert plan.replays == 4


def test_auto_captures_compiled_pieces_around_what_must_run_live() -> None:
    """Field notes row 24: the mode that was chosen by itself is slower: a break forces everything to run without graphs
    or without the compiler. Here both stay."""
    broken, whole = Beside(Scaled(), {"x": 0}, capture_sizes=[4]), Beside(Mlp(), {"x": 0}, capture_sizes=[4])
    for both in (broken, whole):
        repeated(lambda both=both: both(rows(4)), 5)
    assert [(plan.mode, plan.num_segments, plan.captured) for plan in broken.plans] == [
        ("PIECEWISE", 2, ("piece_0", "piece_2"))
    ]
    assert [(plan.mode, plan.num_segments) for plan in whole.plans] == [("FULL", 1)]


def python_calls(call: Callable[[], Any]) -> list[str]:
    """The Python functions that a call enters."""
    entered: list[str] = []

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call":
            entered.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return entered


def replay_of(num_weights: int, num_steps: int) -> list[str]:
    region = Region()
    x = region.tensor("x")
    weights = [region.static(f"w{i}") for i in range(num_weights)]
    y = x
    for _ in range(num_steps):
        y = region.step(torch.add, y, weights[0])
        y = region.step(torch.relu, y, capture=LIVE)
    runner = runner_of(region.returning(region.step(lambda y, *w: torch.stack((y, *w)).sum(0), y, *weights)))
    args = [randn(3) for _ in range(num_weights + 1)]
    warm(runner, *args)
    (plan,) = runner._table.plans.values()
    entered = python_calls(lambda: runner(*args))
    assert runner.stats.replays == 1
    assert "replay" in plan.source
    return entered


def test_host_work_of_a_replay_does_not_grow_with_the_weights() -> None:
    """Field notes row 22: Python that runs per parameter on each call bounds the decode step."""
    assert replay_of(num_weights=1, num_steps=2) == replay_of(num_weights=60, num_steps=2)


def test_every_call_is_counted_without_anything_being_switched_on() -> None:
    """Field notes row 31: statistics are wired into somebody's engine, and re-recordings cannot be seen."""
    model = Mlp()
    both = Beside(model, {"x": 0}, capture_sizes=[4, 8], max_padding_ratio=0.5)
    sizes = [3, 4, 8, 9, 7, 4, 3, 8, 9, 4, 2, 3]
    for n in sizes:
        both(rows(n))
    model.up.weight.data = model.up.weight.data.clone()
    both(rows(4))
    region = both.region
    assert region.replays + sum(region.live_calls.values()) + region.captures == len(sizes) + 1
    assert region.recaptures == 1
    assert region.live_calls["above the ladder, which ends at 8"] == 2
    metrics = graphcap.explain(both.fast).metrics()
    assert metrics["graphcap_replays_total"] == region.replays
    assert metrics["graphcap_recaptures_total"] == 1


def test_another_model_does_not_replay_inside_of_a_capture() -> None:
    """Field notes row 32: a replay happens before the context of a capture has ended, and reads what is not there yet.

    The live step of a capture calls a model whose graphs are in the same pool: it runs live, its values are right, and
    it replays again afterwards. The hook that ends a capture has run before the first replay of what was captured.
    """
    region = Region()
    x = region.tensor("x")
    inner = runner_of(region.returning(region.step(lambda x: x * 2, x)))
    warm(inner, randn(3))
    order: list[str] = []
    region = Region()
    x = region.tensor("x")
    y = region.step(lambda x: x + 1, x)
    z = region.step(lambda y: inner(y)[0], y, capture=LIVE)
    outer = runner_of(region.returning(region.step(lambda z: z - 1, z)), inner.device)
    handles = [
        hooks.on_capture_enter(lambda: order.append("begin")),
        hooks.on_capture_exit(lambda: order.append("end")),
        hooks.before_replay(lambda: order.append("replay")),
    ]
    try:
        for _ in range(5):
            order.clear()
            before, x = inner.stats.replays, randn(3)
            assert torch.equal(outer(x)[0], (x + 1) * 2 - 1)
            assert "begin" not in order or order == ["replay", "begin", "end", "begin", "end"]
            assert inner.stats.replays == before or not outer.stats.plans
    finally:
        for handle in handles:
            handle.remove()
    assert outer.stats.replays == 2
    replays = inner.stats.replays
    inner(randn(3))
    assert inner.stats.replays == replays + 1
