"""The first replays of a plan, and every 256th call, against the function itself."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcap
from graphcap.compiler.breakable import due, recordings
from graphcap.compiler.breakable.steps import StepsAt
from graphcap.errors import GuardError
from tests.compiler.breakable.like_original import CALLS, breakable, num_replays, refused, rows


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def test_a_replay_that_differs_is_refused_and_the_call_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program is given a wrong constant on its way to the runtime: the recordings agree, the replay does not."""
    correct = recordings.steps_of

    def wrong(*args: Any, **kwargs: Any) -> StepsAt:
        recording = args[1]
        call = recording.calls[-1]
        call.leaves = tuple(3.0 if leaf == 2.0 else leaf for leaf in call.leaves)
        built = correct(*args, **kwargs)
        call.leaves = tuple(2.0 if leaf == 3.0 else leaf for leaf in call.leaves)
        return built

    monkeypatch.setattr(recordings, "steps_of", wrong)
    state = torch.zeros(4)

    def function(x: Tensor, state: Tensor) -> Tensor:
        state.add_(1)
        return x * 2.0

    captured = breakable(function)
    before_the_check = 4
    for call in range(1, CALLS + 1):
        got = captured(torch.ones(4), state)
        assert torch.equal(state, torch.full((4,), float(call)))
        if call <= 2 or call > before_the_check:
            assert torch.equal(got, torch.full((4,), 2.0)), call
    (region,) = graphcap.explain(captured).regions
    assert "a replay gave another result 0 than the function" in region.bypass


def test_a_state_that_differs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    correct = recordings.steps_of

    def wrong(*args: Any, **kwargs: Any) -> StepsAt:
        call = args[1].calls[0]
        call.leaves = tuple(5 if leaf == 1 else leaf for leaf in call.leaves)
        built = correct(*args, **kwargs)
        call.leaves = tuple(1 if leaf == 5 else leaf for leaf in call.leaves)
        return built

    monkeypatch.setattr(recordings, "steps_of", wrong)

    def function(x: Tensor, state: Tensor) -> Tensor:
        state.add_(1)
        return x * 2.0

    captured = breakable(function)
    state = torch.zeros(4)
    for call in range(1, CALLS + 1):
        before = state.clone()
        captured(torch.ones(4), state)
        wrong_by_then = call in (3, 4)  # the program, which nothing has compared yet
        assert torch.equal(state, before + (5 if wrong_by_then else 1))
    (region,) = graphcap.explain(captured).regions
    assert "a replay gave another state than the function" in region.bypass


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def call_often(model: nn.Module, x: Tensor, calls: int) -> None:
    for _ in range(calls):
        model(x)


def test_a_changed_attribute_is_found_within_256_calls() -> None:
    model = breakable(Scaled())
    x = rows()
    for _ in range(CALLS):
        model(x)
    model.factor = 3.0
    with pytest.raises(GuardError, match=r"aten::mul at .*test_check.py:\d+ has other arguments"):
        call_often(model, x, due.CHECK_EVERY)
    torch.testing.assert_close(model(x), x * 3)


def test_only_first_replays_and_every_256th_call_run_the_function() -> None:
    class Counting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            box.append(1)
            return x + 1

    class Box:
        """A counter that graphcap does not see."""

        __slots__ = ("count",)

        def append(self, value: int) -> None:
            self.count = getattr(self, "count", 0) + value

    box = Box()
    model = breakable(Counting())
    calls = 2 + 2 * due.CHECK_EVERY
    for _ in range(calls):
        model(rows())
    checks = 2 + due.CHECKED_REPLAYS + 2
    assert box.count == checks
    assert num_replays(model) == calls - 4


def test_a_plan_that_was_captured_again_is_compared_again() -> None:
    model = breakable(nn.Linear(4, 4))
    x = rows()
    for _ in range(CALLS):
        model(x)
    (region,) = graphcap.explain(model).regions
    assert region.recaptures == 0
    model.weight = nn.Parameter(torch.zeros(4, 4))
    for _ in range(CALLS):
        torch.testing.assert_close(model(x), model.bias.expand(3, 4))
    (region,) = graphcap.explain(model).regions
    assert region.recaptures == 1
    assert not region.bypass


def test_nothing_is_said_where_all_is_well() -> None:
    model = breakable(nn.Linear(4, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(CALLS):
            model(rows())
    assert num_replays(model) == CALLS - 4


def test_refused_is_for_one_key_only() -> None:
    def function(x: Tensor, wait: bool) -> Tensor:
        return x * x.sum().item() if wait else x + 1

    captured = breakable(function)
    for _ in range(CALLS):
        captured(rows(), True)
        captured(rows(), False)
    first, second = graphcap.explain(captured).regions
    assert first.bypass
    assert not second.bypass
    assert second.replays == CALLS - 4
    lonely = breakable(lambda x: x * x.sum().item())
    lonely(rows())
    assert "waits for a value" in refused(lonely)
