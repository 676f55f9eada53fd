"""A model whose cache leaves no room for a copy of it: what is recorded, and what is padded all the same."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import graphcap
from graphcap import GraphKey
from graphcap.compiler.frontend.subject import runners_of
from graphcap.cudagraph.hardware.simulated import SimulatedDevice
from tests.compiler.frontend.test_large_cache import WIDTH, Attends, assert_served, call_of, on_a_gpu


def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    cache = torch.randn(2**14, WIDTH)
    monkeypatch.setattr(SimulatedDevice, "spare_bytes", lambda self: cache.nbytes // 8)
    return lambda **settings: captured(cache, simulate=True, **settings)


def captured(cache: torch.Tensor, mixes: bool = False, **settings: Any) -> Attends:
    return graphcap.compile(
        Attends(cache, mixes),
        frontend="breakable",
        dynamic_arg_dims={"x": {0: "n"}, "slots": {0: "n"}},
        pad={"slots": -1},
        capture_sizes=[4, 8],
        **settings,
    )


def on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    made = on_a_gpu(monkeypatch)()
    return lambda **settings: captured(made.cache, **settings)


WHERE = pytest.mark.parametrize("prepare", [on_a_cpu, pytest.param(on_the_gpu, marks=pytest.mark.gpu)])


def inputs_for(model: Attends) -> Any:
    def inputs(key: GraphKey) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return call_of(model, *[-1] * key.num_tokens), {}

    return inputs


@WHERE
def test_capture_records_and_proves_it(prepare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepare(monkeypatch)()
    with torch.no_grad():
        summary = graphcap.capture(model, inputs_for(model))
        assert [key.num_tokens for key in summary.captured] == [8, 4], summary.skipped
        (runner,) = runners_of(model)
        assert not runner.padding.refused
        with graphcap.allow_capture(False):
            for _ in range(2):  # the function itself serves the first one of each size, to be looked at
                assert_served(model, 7, 9000, 70)
                assert_served(model, 5, 6, 70, 1, 2)
            assert runner.stats.replays == 2
    (region,) = graphcap.explain(model).regions
    assert "too large to be copied" in region.unchecked["replays against the function"]


@WHERE
def test_traffic_records_a_rung_by_a_call_of_its_size(prepare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepare(monkeypatch)()
    with torch.no_grad():
        for _ in range(5):
            assert_served(model, 3, 5000, 4)
        (runner,) = runners_of(model)
        assert not runner.stats.plans
        assert any("padded sizes are not recorded" in reason for reason in runner.stats.live_calls)
        for last in range(9, 13):
            assert_served(model, 3, 5000, 4, last)
        for _ in range(4):
            assert_served(model, 3, 5000, 4)
        (runner,) = runners_of(model)
        assert [plan.key for plan in runner.stats.plans] == [(4,)]
        assert not runner.padding.refused
        assert runner.stats.replays >= 1


@WHERE
def test_mixing_is_found_beside_it(prepare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepare(monkeypatch)(mixes=True)
    with torch.no_grad():
        graphcap.capture(model, inputs_for(model))
        for last in range(4, 8):
            x, places = call_of(model, 3, 5000, last)
            torch.testing.assert_close(model(x, places), 2 * x / x.abs().max())
        (runner,) = runners_of(model)
        (reason,) = runner.padding.refused.values()
    assert "mixes rows" in reason


class Branches(Attends):
    def forward(self, x: Tensor, slots: Tensor) -> Tensor:
        return super().forward(x if x.shape[0] > 6 else x * 2, slots)


@pytest.mark.parametrize("sealed", [False, True])
def test_a_branch_on_the_size_is_found_by_what_was_recorded(sealed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be compared: a size that shows other operators than the rung is not padded to it."""
    monkeypatch.setattr(sys.modules[__name__], "Attends", Branches)
    model = on_a_cpu(monkeypatch)()
    with torch.no_grad():
        graphcap.capture(model, inputs_for(model))
        with graphcap.allow_capture(not sealed):
            for slots in ((1, 2, 3, 4, 5, 6, 7), (1, 2, 3, 4, 5)) * 4:
                x, places = call_of(model, *slots)
                torch.testing.assert_close(model(x, places), (4 if len(slots) > 6 else 8) * x)


@pytest.mark.parametrize("branches", [False, True])
def test_traffic_alone_is_proved_and_recorded_at_every_size(branches: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if branches:
        monkeypatch.setattr(sys.modules[__name__], "Attends", Branches)
    model = on_a_cpu(monkeypatch)()
    with torch.no_grad():
        for number, length in enumerate((8, 8, 8, 7, 7, 7, 5, 5, 5, 5)):
            x, places = call_of(model, *range(number, number + length))
            torch.testing.assert_close(model(x, places), (8 if branches and length <= 6 else 4) * x)
    (runner,) = runners_of(model)
    assert not runner.padding.refused
    assert [plan.key for plan in runner.stats.plans] == ([] if branches else [(8,)])
    assert any("more than sizes differs" in reason for reason in runner.stats.live_calls) == branches
