"""What dispatch answers is what calls then do: the same mode, and a plan of the same sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcap
from graphcap import GraphKey
from graphcap.compiler.frontend.subject import runners_of

SETTINGS: dict[str, Any] = {"compiler": "eager", "simulate": True, "cache": False, "capture_sizes": [2, 4, 8]}


class Requests(nn.Module):
    """Rows of tokens and of requests, both among the arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, lens: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x), lens + 1


def compiled(**settings: Any) -> Requests:
    torch.manual_seed(0)
    dims = {"x": {0: "num_tokens"}, "lens": {0: "num_reqs"}}
    return graphcap.compile(Requests(), dynamic_arg_dims=dims, **{**SETTINGS, **settings})


def arguments(num_tokens: int, num_reqs: int) -> tuple[Tensor, Tensor]:
    return torch.randn(num_tokens, 4), torch.arange(num_reqs)


def inputs(key: GraphKey) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return arguments(key.num_tokens, key.num_reqs or 1), {}


def said(num_tokens: int, num_reqs: int, length: int | None = None) -> dict[str, Any]:
    """A batch, for a step and for dispatch."""
    return {"num_tokens": num_tokens, "num_reqs": num_reqs, "uniform_query_len": length}


def mode_of_call(model: Any, step: dict[str, Any], num_tokens: int, num_reqs: int) -> str:
    """The mode of the plan that serves a call, NONE where it runs live."""
    before = {id(plan): plan.replays for runner in runners_of(model) for plan in runner.stats.plans}
    x, lens = arguments(num_tokens, num_reqs)
    with graphcap.step(**step):
        rows, more = model(x, lens)
    torch.testing.assert_close(rows, model.linear(x))
    assert torch.equal(more, lens + 1)
    (runner,) = runners_of(model)
    used = [plan.mode for plan in runner.stats.plans if plan.replays != before.get(id(plan), 0)]
    return used[0] if used else "NONE"


def mode_of(model: Any, *batch: Any) -> str:
    return mode_of_call(model, said(*batch), *batch[:2])


BATCHES = [
    (n, reqs, length)
    for n in range(1, 10)
    for length in (None, 1, 2)
    if not length or n % length == 0
    for reqs in ([n // length] if length else sorted({1, (n + 1) // 2, n}))
]


LADDERS: list[dict[str, Any]] = [
    {},
    {"max_num_reqs": 3},  # the top rung of decode is right above another
    {"capture_sizes": [6, 7, 8]},
    {"capture_sizes": {"num_tokens": [2, 7, 8], "num_reqs": [2, 8]}},
    {"capture_sizes": [2]},
]


@pytest.mark.parametrize("ladder", LADDERS, ids=str)
@pytest.mark.parametrize("mode", ["FULL", "AUTO", "FULL_AND_PIECEWISE", "FULL_DECODE_ONLY", "PIECEWISE"])
@torch.no_grad()
def test_calls_run_as_dispatched_after_a_capture(mode: str, ladder: dict[str, Any]) -> None:
    model, wrong = compiled(cudagraph_mode=mode, **ladder), []
    graphcap.capture(model, inputs)
    with graphcap.allow_capture(False):
        for batch in BATCHES:
            decision = graphcap.dispatch(model, **said(*batch))
            modes = [mode_of_call(model, step, *batch[:2]) for step in (said(*batch), {"dispatch": decision})]
            if {*modes} != {decision.mode.name}:
                wrong.append((batch, decision, modes))
    assert not wrong


@pytest.mark.parametrize("mode", ["FULL", "AUTO"])
@torch.no_grad()
def test_a_padded_decode_batch_is_replayed_after_a_capture(mode: str) -> None:
    model = compiled(cudagraph_mode=mode)
    summary = graphcap.capture(model, inputs)
    assert len(summary.captured) == 3, summary
    with graphcap.allow_capture(False):
        assert [mode_of(model, n, n, 1) for n in (3, 5, 6, 7)] == ["FULL"] * 4
        assert [mode_of(model, n, n) for n in (8, 4, 2)] == ["FULL"] * 3, "mixed ones of its sizes too"


@pytest.mark.parametrize("mode", ["FULL", "AUTO"])
@torch.no_grad()
def test_a_padded_decode_batch_is_replayed_where_a_mixed_one_came_first(mode: str) -> None:
    """The plan of the mixed one may be padded in its tokens alone. It gives way to one that serves both."""
    model = compiled(cudagraph_mode=mode)
    for n in (8, 4) * 4:
        mode_of(model, n, n)
    (runner,) = runners_of(model)
    assert len(runner.stats.plans) == 2
    assert [mode_of(model, n, n, 1) for n in (3, 5, 6, 7) * 5][8:] == ["FULL"] * 12, runner.stats.live_calls
    assert set(runner.stats.live_calls) == {"warm-up"}
    assert [mode_of(model, n, n) for n in (8, 4)] == ["FULL"] * 2
    assert len(runner.stats.plans) == 2


@torch.no_grad()
def test_a_plan_that_would_give_way_is_not_promised_where_captures_are_forbidden() -> None:
    model = compiled(cudagraph_mode="FULL")
    for _ in range(4):
        mode_of(model, 4, 4)
    assert graphcap.dispatch(model, **said(3, 3, 1)).mode.name == "FULL"
    with graphcap.allow_capture(False):
        decision = graphcap.dispatch(model, **said(3, 3, 1))
        assert (decision.mode.name, mode_of(model, 3, 3, 1)) == ("NONE", "NONE")
        assert "not allowed" in decision.reason
        assert mode_of(model, 4, 4) == "FULL"
