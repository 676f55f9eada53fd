"""dispatch and capture on compiled models."""

from __future__ import annotations

import gc
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

import graphcap
from graphcap import GraphKey
from graphcap.compiler.frontend import serving
from graphcap.cudagraph.cost import StepTime
from graphcap.cudagraph.simulated import SimulatedDevice, SimulatedSegment
from graphcap.errors import StepError

SETTINGS: dict[str, Any] = {"compiler": "eager", "simulate": True, "cache": False, "capture_sizes": [2, 4, 8]}


class Counting(nn.Module):
    """Row-wise, and counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.linear(x)


def compiled(**settings: Any) -> Counting:
    torch.manual_seed(0)
    return graphcap.compile(Counting(), dynamic_arg_dims={"x": 0}, **{**SETTINGS, **settings})


def inputs(key: GraphKey) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randn(key.num_tokens, 4),), {}


def plans_of(model: nn.Module) -> list[Any]:
    return [plan for region in graphcap.explain(model).regions for plan in region.plans]


def test_the_ladder_is_captured_largest_first_and_traffic_replays() -> None:
    model = compiled()
    with torch.no_grad():
        summary = graphcap.capture(model, inputs)
        assert [key.num_tokens for key in summary.captured] == [8, 4, 2]
        assert not summary.skipped
        assert summary.bytes > 0
        x = torch.randn(4, 4)
        assert torch.allclose(model(x), model.linear(x))
    assert sum(plan.replays for plan in plans_of(model)) >= 1


def test_a_rung_whose_capture_showed_that_a_graph_does_not_pay_is_captured_again(monkeypatch) -> None:
    """The first rung that is captured is the one that measures; it must not be the one that is missing."""

    @graphcap.eager
    def between(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    class Cut(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return between(x + 1).relu().cumsum(1)

    def clock(call: Any) -> StepTime:
        call()
        is_replay = isinstance(getattr(call, "__self__", None), SimulatedSegment)
        seen.append(is_replay)
        return StepTime(8.0, 8.0) if is_replay or len(seen) > 11 else StepTime(2.0, 2.0)

    seen: list[bool] = []
    monkeypatch.setattr(SimulatedDevice, "stopwatch", staticmethod(clock))
    model = graphcap.compile(Cut(), dynamic_arg_dims={"x": 0}, **SETTINGS)
    with torch.no_grad():
        summary = graphcap.capture(model, inputs)
        assert [key.num_tokens for key in summary.captured] == [8, 4, 2]
        x = torch.randn(4, 4)
        assert torch.allclose(model(x), ((x + 1) * 2).relu().cumsum(1))
    assert len(seen) == 22
    assert {plan.num_segments for plan in plans_of(model)} == {1}
    assert "a graph would not pay: 2.0 us live, 8.0 us replayed" in str(graphcap.explain(model))


def test_state_is_as_before_the_capture() -> None:
    model = compiled()
    with torch.no_grad():
        graphcap.capture(model, inputs)
        assert model.calls.item() == 0
        model(torch.randn(4, 4))
        assert model.calls.item() == 1


def test_inputs_are_made_afresh_inside_of_their_step() -> None:
    made: Counter[int] = Counter()
    model = compiled(num_warmups=3)

    def make(key: GraphKey) -> tuple[tuple[Any, ...], dict[str, Any]]:
        assert graphcap.current_step().key == key
        made[key.num_tokens] += 1
        return inputs(key)

    with torch.no_grad():
        graphcap.capture(model, make)
    assert made[4] == made[2] == 3 + 1


@pytest.mark.parametrize("collecting", [True, False])
def test_the_collector_is_left_as_it_was(collecting: bool) -> None:
    model, was = compiled(), gc.isenabled()
    seen = []

    def make(key: GraphKey) -> tuple[tuple[Any, ...], dict[str, Any]]:
        seen.append(gc.isenabled())
        return inputs(key)

    try:
        (gc.enable if collecting else gc.disable)()
        with torch.no_grad():
            graphcap.capture(model, make)
        assert gc.isenabled() is collecting
        assert not any(seen)
    finally:
        (gc.enable if was else gc.disable)()


def test_what_make_inputs_raises_comes_through_and_the_model_works() -> None:
    model = compiled()

    def make(key: GraphKey) -> Any:
        if key.num_tokens == 4:
            raise KeyError("no such batch")
        return inputs(key)

    with torch.no_grad():
        with pytest.raises(KeyError, match="no such batch"):
            graphcap.capture(model, make)
        assert model.calls.item() == 0
        x = torch.randn(8, 4)
        assert torch.allclose(model(x), model.linear(x))


def test_a_model_without_a_ladder_is_told_how_to_get_one() -> None:
    with torch.no_grad(), pytest.raises(StepError, match="no ladder to capture"):
        graphcap.capture(compiled(cudagraph_mode="NONE"), inputs)


def test_what_was_not_captured_says_why() -> None:
    model = compiled()
    with torch.no_grad(), graphcap.allow_capture(False):
        summary = graphcap.capture(model, inputs)
    assert not summary.captured
    assert {"captures are not allowed (graphcap.allow_capture(False))"} == set(summary.skipped.values())


def test_dispatch_before_and_after_the_first_call() -> None:
    model = compiled()
    before = graphcap.dispatch(model, num_tokens=4)
    assert (before.mode.name, before.num_tokens) == ("NONE", 4)
    assert "nothing is compiled yet" in before.reason
    with torch.no_grad():
        graphcap.capture(model, inputs)
    assert graphcap.dispatch(model, num_tokens=4).mode.name == "FULL"
    assert graphcap.dispatch(model, num_tokens=4, max_mode="PIECEWISE").mode.name == "PIECEWISE"
    assert graphcap.dispatch(model, num_tokens=4, max_mode="NONE").reason == "max_mode=NONE"
    with pytest.raises(StepError, match="num_tokens=-4"):
        graphcap.dispatch(model, num_tokens=-4)


def test_a_vetoed_call_runs_live() -> None:
    model = compiled()
    with torch.no_grad():
        graphcap.capture(model, inputs)
        before = sum(plan.replays for plan in plans_of(model))
        with graphcap.step(num_tokens=4, max_mode="NONE"):
            model(torch.randn(4, 4))
    assert sum(plan.replays for plan in plans_of(model)) == before


def test_dispatch_looks_for_the_graphs_of_a_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[nn.Module] = []
    look = serving.runners_of
    monkeypatch.setattr(serving, "runners_of", lambda model: looked.append(model) or look(model))
    first, second = compiled(), compiled()
    assert graphcap.dispatch(first, num_tokens=4).reason.startswith("nothing is compiled yet")
    with torch.no_grad():
        graphcap.capture(first, inputs)
        looked.clear()
        assert [graphcap.dispatch(first, num_tokens=4).mode.name for _ in range(3)] == ["FULL"] * 3
        assert looked == [first]
        graphcap.capture(second, inputs)
        assert graphcap.dispatch(first, num_tokens=4).mode.name == "FULL"
    assert graphcap.dispatch(second, num_tokens=4).mode.name == "FULL"


@pytest.mark.parametrize("mode", ["PIECEWISE", "FULL"])
def test_the_capture_proves_padding_for_every_rung(mode: str) -> None:
    model = compiled(cudagraph_mode=mode, max_padding_ratio=0.9)
    with torch.no_grad():
        graphcap.capture(model, inputs)
        (before,) = graphcap.explain(model).regions
        with graphcap.allow_capture(False):
            for num_tokens in (7, 3, 1, 5):
                with graphcap.step(num_tokens=num_tokens, num_reqs=num_tokens):
                    x = torch.randn(num_tokens, 4)
                    assert torch.allclose(model(x), model.linear(x), atol=1e-6)
    (after,) = graphcap.explain(model).regions
    assert (after.replays - before.replays, after.live_calls) == (4, before.live_calls)
