"""Bugs of weights: graphs go on with the addresses of weights that were replaced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcap
from tests.known_bugs.models import SETTINGS, Mlp, plans_of, rows


def new_values(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(value.shape, generator=generator) for name, value in model.state_dict().items()}


def load(model: Mlp) -> None:
    model.load_state_dict(new_values(model))


def merge_lora(model: Mlp) -> None:
    low, high = torch.ones(16, 2), torch.ones(2, 8)
    with torch.no_grad():
        model.up.weight += low @ high


def refit(model: Mlp) -> None:
    """As an RL trainer does it: into the tensors that are there."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(new_values(model)[name])


def assign(model: Mlp) -> None:
    model.load_state_dict(new_values(model), assign=True)


def there_and_back(model: Mlp) -> None:
    load(model)
    model.double().float()


def merge_out_of_place(model: Mlp) -> None:
    model.up.weight.data = model.up.weight.data + 1


def replace_parameter(model: Mlp) -> None:
    model.down.weight = nn.Parameter(new_values(model)["down.weight"])


def replace_layer(model: Mlp) -> None:
    model.down = nn.Linear(16, 8)
    load(model)


IN_PLACE = [load, merge_lora, refit]
MOVED = [assign, there_and_back, merge_out_of_place, replace_parameter, replace_layer]
WAYS = ["decorator path", "torch.compile"]


def compiled(model: nn.Module, way: str, **settings: Any) -> Callable[[Tensor], Tensor]:
    if way == "torch.compile":
        return torch.compile(model, backend="graphcap", options={**SETTINGS, **settings})
    return graphcap.compile(model, dynamic_arg_dims={"x": 0}, capture_sizes=[4], **SETTINGS, **settings)


def is_right(fast: Callable[[Tensor], Tensor], model: Mlp, calls: int = 5) -> bool:
    with torch.no_grad():
        inputs = [rows(4) for _ in range(calls)]
        return all(torch.allclose(fast(x), Mlp.forward(model, x), atol=1e-5) for x in inputs)


def counters(target: Any) -> tuple[int, int, int]:
    """Recaptures, replays, calls without a graph."""
    regions = graphcap.explain(target).regions
    live = sum(sum(region.live_calls.values()) for region in regions)
    return sum(region.recaptures for region in regions), sum(region.replays for region in regions), live


@pytest.fixture(autouse=True)
def _same_weights() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("update", IN_PLACE)
def test_values_that_change_in_place_are_seen_and_cost_nothing(update: Callable[[Mlp], None], way: str) -> None:
    """Field notes row 12, the harmless half: addresses hold, so that no graph is recorded again."""
    model = Mlp()
    fast = compiled(model, way)
    assert is_right(fast, model)
    _, replays, live = counters(fast)
    update(model)
    assert is_right(fast, model)
    assert counters(fast) == (0, replays + 5, live)


@pytest.mark.parametrize("guards", ["full", "sealed"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("update", MOVED)
def test_weights_at_another_place_are_captured_again(update: Callable[[Mlp], None], way: str, guards: str) -> None:
    """Field notes row 12: after a weight reload graphs read old addresses, silently."""
    model = Mlp()
    fast = compiled(model, way, guards=guards)
    assert is_right(fast, model)
    for _ in range(2):
        update(model)
        assert is_right(fast, model, calls=6)
    _, before, _ = counters(fast)
    assert is_right(fast, model, calls=3)
    assert counters(fast)[1] == before + 3, "graphs again"


def test_only_the_plans_of_the_moved_weights_are_captured_again() -> None:
    """Field notes row 12: exactly the affected plans, of one model beside another one of its class."""
    ours, other = Mlp(), Mlp()
    for model in (ours, other):
        compiled(model, "decorator path")
        assert is_right(model, model)
    untouched, (_, replays, live) = plans_of(other), counters(other)
    merge_out_of_place(ours)
    for _ in range(3):
        assert is_right(ours, ours)
        assert is_right(other, other)
    assert counters(ours)[0] == 1, "once"
    assert counters(other) == (0, replays + 15, live)
    assert [plan.seconds for plan in plans_of(other)] == [plan.seconds for plan in untouched]


def test_a_model_is_found_by_the_weights_that_it_has_now() -> None:
    """Field notes row 12: a function around the model was traced with weights that are gone, and yet ``release`` frees
    its graphs and ``explain`` shows them."""
    model = Mlp()

    def step(x: Tensor) -> Tensor:
        return model(x) + 1

    fast = torch.compile(step, backend="graphcap", options=SETTINGS)
    with torch.no_grad():
        for _ in range(2):
            for _ in range(4):
                x = rows(4)
                torch.testing.assert_close(fast(x), Mlp.forward(model, x) + 1)
            assign(model)
        fast(rows(4)), fast(rows(4)), fast(rows(4))
    assert len(plans_of(model)) == 1
    graphcap.release(model)
    assert plans_of(model) == []
    assert plans_of(step) == []
