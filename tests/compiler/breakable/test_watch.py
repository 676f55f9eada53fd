"""A recording lacks what comes later and does what is gone: modules, parameters, buffers and hooks that come and go."""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import graphcap
from graphcap.compiler.breakable.hooked import Hooks
from graphcap.compiler.breakable.target import MAX_STATES
from tests.compiler.breakable.like_original import CALLS, Mlp, breakable, num_replays, rows


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


class Adapted(nn.Module):
    """With a place for everything that may come later."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4, bias=False)])
        self.adapters = nn.ModuleDict()
        self.extra: nn.Module | None
        self.register_module("extra", None)
        self.mask: Tensor | None
        self.register_buffer("mask", None)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        for adapter in self.adapters.values():
            x = x + adapter(x)
        if self.extra is not None:
            x = x + self.extra(x)
        if self.mask is not None:
            x = x * self.mask
        for name, value in (*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)):
            x = x + value if name != "mask" else x
        return x


def linear() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(4, 4)


ADDITIONS: dict[str, Callable[[Any], object]] = {
    "a layer": lambda model: model.layers.append(linear()),
    "an adapter": lambda model: model.adapters.update({"lora": linear()}),
    "a module where there was none": lambda model: setattr(model, "extra", linear()),
    "a bias where there was none": lambda model: setattr(model.layers[1], "bias", nn.Parameter(torch.ones(4))),
    "a buffer where there was none": lambda model: setattr(model, "mask", torch.full((4,), 2.0)),
    "a parameter": lambda model: model.register_parameter("lora", nn.Parameter(torch.ones(4))),
    "a buffer": lambda model: model.register_buffer("offset", torch.ones(4)),
}


@pytest.mark.parametrize("addition", list(ADDITIONS))
def test_what_is_added_to_a_module_acts_at_the_next_call(addition: str) -> None:
    original = Adapted()
    model = breakable(Adapted())
    model.load_state_dict(original.state_dict())
    x = rows()
    for _ in range(CALLS):
        assert torch.equal(model(x), original(x))
    replays = num_replays(model)
    assert replays >= 2
    for each in (original, model):
        ADDITIONS[addition](each)
    for _ in range(CALLS):
        assert torch.equal(model(x), original(x))
    assert num_replays(model) >= replays + 2


def test_an_unused_buffer_that_comes_and_goes_leads_back_to_the_first_recording() -> None:
    model = breakable(nn.Linear(4, 4))
    x = rows()
    for _ in range(CALLS):
        model(x)
    replays = num_replays(model)
    model.register_buffer("unused", torch.ones(4))
    model(x)
    assert num_replays(model) == replays
    del model.unused
    model(x)
    assert num_replays(model) == replays + 1


def plus_100(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output + 100


REGISTER: dict[str, Callable[[nn.Module], Any]] = {
    "of the module": lambda model: model.register_forward_hook(plus_100),
    "of a part of it": lambda model: model.get_submodule("0").register_forward_hook(plus_100),
    "of all modules": lambda model: register_module_forward_hook(plus_100),
}


@pytest.mark.parametrize("of", list(REGISTER))
def test_a_removed_hook_has_no_say_in_the_next_call(of: str) -> None:
    original, x = nn.Sequential(nn.Linear(4, 4)), rows()
    expected = original(x)
    handle = REGISTER[of](original)
    model = breakable(original)
    try:
        for _ in range(CALLS):
            assert torch.equal(model(x), original.forward(x) + 100 * (of != "of a part of it"))
        assert num_replays(model) >= 2
    finally:
        handle.remove()
    for _ in range(CALLS):
        assert torch.equal(model(x), expected)


def test_without_a_late_hook_the_first_recording_serves_again() -> None:
    model = breakable(nn.Linear(4, 4))
    x = rows()
    for _ in range(CALLS):
        model(x)
    replays, expected = num_replays(model), model(x)
    for _ in range(3 * MAX_STATES):  # a hook that is gone takes no place from those that are there
        handle = model.register_forward_hook(plus_100)
        assert torch.equal(model(x), expected + 100)
        handle.remove()
    assert torch.equal(model(x), expected)
    assert num_replays(model) == replays + 2
    assert not graphcap.explain(model).regions[-1].bypass
    assert len(graphcap.explain(model).regions) <= 2


def test_hooks_of_a_module_inside_an_object_are_noticed() -> None:
    class Runner:
        def __init__(self) -> None:
            self.model = nn.Linear(4, 4)

        def step(self, x: Tensor) -> Tensor:
            return self.model(x)

    runner, x = Runner(), rows()
    step = breakable(runner.step)
    for _ in range(CALLS):
        step(x)
    expected = step(x)
    handle = runner.model.register_forward_hook(plus_100)
    assert torch.equal(step(x), expected + 100)
    handle.remove()
    assert torch.equal(step(x), expected)


def test_of_two_modules_with_a_copied_hook_one_may_lose_it() -> None:
    first = nn.Linear(4, 4)
    first.register_forward_hook(plus_100)
    second = copy.deepcopy(first)
    hooks = Hooks([first, second])
    assert hooks.hold()
    second._forward_hooks.clear()
    assert not hooks.hold()


def weights(model: nn.Module) -> list[weakref.ref[Tensor]]:
    return [weakref.ref(each) for each in (*model.parameters(), *model.buffers())]


def alive(tensors: list[weakref.ref[Tensor]]) -> list[Tensor]:
    gc.collect()
    return [tensor for each in tensors if (tensor := each()) is not None]


def test_replaced_parameters_are_not_kept() -> None:
    model = breakable(Mlp().eval())
    x = rows()
    for _ in range(2):
        for _ in range(CALLS):
            model(x)
        old = weights(model)
        model.load_state_dict({name: each.clone() for name, each in model.state_dict().items()}, assign=True)
        assert not alive(old)
    expected = torch.relu(model.fc(x))
    for _ in range(CALLS):
        assert torch.equal(model(x), expected)
    assert len(graphcap.explain(model).regions) == 1


def test_a_model_that_sleeps_gives_its_weights_back() -> None:
    model = breakable(nn.Linear(4, 4, bias=False))
    x = rows()
    for _ in range(CALLS):
        expected = model(x)
    weight = model.weight.detach().clone()
    old = weights(model)
    graphcap.release(model)
    model.weight = None
    assert not alive(old)
    model.weight = nn.Parameter(weight)
    for _ in range(CALLS):
        assert torch.equal(model(x), expected)


def test_weights_of_a_replaced_module_go_at_the_next_call() -> None:
    model = breakable(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    for x in (rows(2), rows(3)):
        for _ in range(CALLS):
            model(x)
    old = weights(model[0])
    model[0] = nn.Identity()
    for _ in range(CALLS):
        assert torch.equal(model(x), model[1](x))
    assert not alive(old)
    (region,) = graphcap.explain(model).regions
    assert region.replays >= 2


def test_a_tensor_without_a_path_is_kept() -> None:
    def hidden(make: Callable[[], Tensor]) -> Callable[[Tensor], Tensor]:
        @functools.cache
        def table() -> Tensor:
            return make()

        return lambda x: x + table()

    captured = breakable(hidden(lambda: torch.ones(4)))
    for _ in range(CALLS):
        assert torch.equal(captured(torch.zeros(4)), torch.ones(4))
    assert num_replays(captured) >= 2
