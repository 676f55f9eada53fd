"""dispatch: what it answers, and for how long an answer is remembered."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import graphcap
from graphcap import GraphKey
from graphcap.compiler.frontend import dispatch as dispatching
from graphcap.compiler.frontend.subject import runners_of
from graphcap.cudagraph.outlook import Outlook
from graphcap.errors import StepError
from tests.compiler.frontend.test_serving import compiled, inputs


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[GraphKey]:
    """The batches that a runner was asked about, not those whose answer was remembered."""
    found: list[GraphKey] = []
    decide = Outlook.decide
    monkeypatch.setattr(Outlook, "decide", lambda self, key, mode: found.append(key) or decide(self, key, mode))
    return found


def captured(**settings: Any) -> nn.Module:
    model = compiled(**settings)
    with torch.no_grad():
        graphcap.capture(model, inputs)
    return model


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


def test_dispatch_looks_for_the_graphs_of_a_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[nn.Module] = []
    look = dispatching.runners_of
    monkeypatch.setattr(dispatching, "runners_of", lambda model: looked.append(model) or look(model))
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


def test_an_answer_is_remembered_for_each_kind_of_batch(asked: list[GraphKey]) -> None:
    model = captured()
    asked.clear()
    kinds: list[dict[str, Any]] = [
        {"num_tokens": 4},
        {"num_tokens": 3},
        {"num_tokens": 4, "num_reqs": 4, "uniform_query_len": 1},
        {"num_tokens": 4, "tags": {"lora": 1}},
        {"num_tokens": 4, "tags": {"lora": 2}},
        {"num_tokens": 4, "max_mode": "NONE"},
        {"num_tokens": 4, "max_mode": "PIECEWISE"},
    ]
    first = [graphcap.dispatch(model, **kind) for kind in kinds]
    assert len(asked) == len(kinds)
    assert [graphcap.dispatch(model, **kind) for kind in kinds] == first
    assert len(asked) == len(kinds)


def drop_a_plan(model: nn.Module) -> None:
    (runner,) = runners_of(model)
    runner._table.drop(next(iter(runner._table.plans)))


def refuse_padding(model: nn.Module) -> None:
    (runner,) = runners_of(model)
    runner.padding.refuse(list(runner.padding.names), "rows are mixed")


@pytest.mark.parametrize("change", [graphcap.release, drop_a_plan, refuse_padding])
def test_an_answer_is_forgotten_when_something_changes(
    change: Callable[[nn.Module], None], asked: list[GraphKey]
) -> None:
    model = captured()
    graphcap.dispatch(model, num_tokens=3)
    asked.clear()
    change(model)
    graphcap.dispatch(model, num_tokens=3)
    assert asked == [GraphKey(3)]


def test_a_seal_changes_the_answer_and_its_end_changes_it_back() -> None:
    model = captured()
    graphcap.release(model)
    before = graphcap.dispatch(model, num_tokens=4)
    assert before.mode.name == "FULL"
    with graphcap.allow_capture(False):
        assert "not allowed" in graphcap.dispatch(model, num_tokens=4).reason
    assert graphcap.dispatch(model, num_tokens=4) == before


def test_a_refusal_of_padding_changes_the_answer() -> None:
    model = captured()
    assert graphcap.dispatch(model, num_tokens=3).num_tokens == 4
    refuse_padding(model)
    assert graphcap.dispatch(model, num_tokens=3).num_tokens == 3


def test_a_full_device_is_asked_about_again() -> None:
    """Else an engine that follows the answer would never learn that there is room."""
    model = captured(max_graph_bytes=0)
    answers = [graphcap.dispatch(model, num_tokens=4).mode.name for _ in range(20)]
    assert {"NONE", "FULL"} == set(answers)


def test_answers_keep_neither_model_nor_runner_alive() -> None:
    model = captured()
    assert graphcap.dispatch(model, num_tokens=4).mode.name == "FULL"
    torch.compiler.reset()
    gc.collect()
    assert graphcap.dispatch(model, num_tokens=4).mode.name == "NONE"


def test_what_cannot_be_compiled_is_refused() -> None:
    with pytest.raises(TypeError, match="expected a module"):
        graphcap.dispatch(3, num_tokens=4)
    with pytest.raises(StepError, match="is not hashable"):
        graphcap.dispatch(compiled(), num_tokens=4, tags={"lora": [1]})
    for wrong in ({"tags": [("lora", 1)]}, {"sizes": [8]}):
        with pytest.raises(StepError, match="expected a dict"):
            graphcap.dispatch(compiled(), num_tokens=4, **wrong)
