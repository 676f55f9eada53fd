"""A recording lacks what comes later and does what is gone: modules, parameters, buffers and hooks that come and go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.compiler.breakable.like_original import CALLS, breakable, num_replays, rows


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
