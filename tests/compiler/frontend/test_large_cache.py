"""A model whose cache leaves no room for a copy of it is padded all the same."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcap
from graphcap import GraphKey
from graphcap.compiler.frontend.subject import runners_of
from graphcap.cudagraph.hardware.simulated import SimulatedDevice

WIDTH = 64
SETTINGS: dict[str, Any] = {"compiler": "eager", "cache": False, "capture_sizes": [4, 8], "capture_after": 99}


class Attends(nn.Module):
    """Writes its rows into the slots of a cache and reads them there; a slot of -1 is none."""

    def __init__(self, cache: Tensor, mixes: bool) -> None:
        super().__init__()
        self.register_buffer("cache", cache)
        self.mixes = mixes

    def forward(self, x: Tensor, slots: Tensor) -> Tensor:
        x = x / x.abs().max() if self.mixes else x * 2
        place = slots.clamp(min=0)
        self.cache.index_put_((place,), torch.where((slots >= 0)[:, None], x, self.cache[place]))
        return x + self.cache[place]


def attends(cache: Tensor, mixes: bool = False, **settings: Any) -> Attends:
    dims = {"x": {0: "n"}, "slots": {0: "n"}}
    return graphcap.compile(Attends(cache, mixes), dynamic_arg_dims=dims, pad={"slots": -1}, **SETTINGS, **settings)


def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Attends]:
    cache = torch.randn(2**14, WIDTH)
    monkeypatch.setattr(SimulatedDevice, "spare_bytes", lambda self: cache.nbytes // 8)
    return lambda **settings: attends(cache, simulate=True, **settings)


def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Attends]:
    gc.collect()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    cache = torch.zeros(int(free * 0.6) // (2 * WIDTH), WIDTH, dtype=torch.bfloat16, device="cuda")
    return lambda **settings: attends(cache, **settings)


WHERE = pytest.mark.parametrize("prepare", [on_a_cpu, pytest.param(on_a_gpu, marks=pytest.mark.gpu)])


def call_of(model: Attends, *slots: int) -> tuple[Tensor, Tensor]:
    like = model.cache
    x = torch.randn(len(slots), WIDTH, dtype=like.dtype, device=like.device)
    return x, torch.tensor(slots, device=like.device)


def assert_served(model: Attends, *slots: int) -> None:
    x, places = call_of(model, *slots)
    torch.testing.assert_close(model(x, places), 4 * x)
    torch.testing.assert_close(model.cache[places], 2 * x)


@WHERE
def test_traffic_alone_proves_it(prepare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepare(monkeypatch)()
    with torch.no_grad():
        for last in range(4, 9):
            assert_served(model, 3, 5000, last)
        (runner,) = runners_of(model)
        assert not runner.padding.refused
        replays = runner.stats.replays
        assert_served(model, 1, 2, 3)
        assert runner.stats.replays == replays + 1


@WHERE
def test_capture_proves_it(prepare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With indices that point nowhere."""
    model = prepare(monkeypatch)()

    def inputs(key: GraphKey) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return call_of(model, *[-1] * key.num_tokens), {}

    with torch.no_grad():
        summary = graphcap.capture(model, inputs)
        assert [key.num_tokens for key in summary.captured] == [8, 4], summary.skipped
        (runner,) = runners_of(model)
        assert not runner.padding.refused
        with graphcap.allow_capture(False):
            replays = runner.stats.replays
            assert_served(model, 7, 9000, 70)
            assert runner.stats.replays == replays + 1


@WHERE
def test_mixing_is_found_beside_it(prepare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepare(monkeypatch)(mixes=True)
    with torch.no_grad():
        for last in range(4, 8):
            x, places = call_of(model, 3, 5000, last)
            torch.testing.assert_close(model(x, places), 2 * x / x.abs().max())
        (runner,) = runners_of(model)
        (reason,) = runner.padding.refused.values()
    assert "mixes rows" in reason
