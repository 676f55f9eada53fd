"""What a replay calls to see that static inputs are where they were."""

from __future__ import annotations

import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

from graphcap import native
from graphcap.config import Config
from graphcap.cudagraph import GraphRunner, device_for
from graphcap.native import fallback
from graphcap.native.extension import Extension
from tests.cudagraph.regions import Region, randn, runner_of, warm
from tests.native.conftest import built


def scaled() -> Region:
    region = Region()
    x, scale = region.tensor("x"), region.static("weight")
    region.step(lambda x, scale: x * scale, x, scale)
    return region


def check_in(runner: GraphRunner) -> object:
    (plan,) = runner._table.plans.values()
    return plan.replay.__globals__["addresses_hold"]


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> tuple[Extension, ModuleType]:
    """A process that has not asked for the extension yet, and the extension that it will get."""
    module = built()
    if isinstance(module, str):
        pytest.skip(module)
    fresh = Extension()
    for name in ("address_check", "when_ready", "prepare", "status"):
        monkeypatch.setattr(native, name, getattr(fresh, name))
    return fresh, module


def test_plans_change_over_to_the_extension(extension: tuple[Extension, ModuleType]) -> None:
    fresh, module = extension
    runner, x, weight = runner_of(scaled().returning(2)), randn(4), randn(4)
    warm(runner, x, weight)
    assert isinstance(check_in(runner), fallback.AddressCheck)
    assert module.__file__ is not None
    fresh.prepare(Path(module.__file__).parents[2])
    deadline = time.monotonic() + 60
    while fresh.status() == "building" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert type(check_in(runner)).__module__ == "graphcap_native"
    replays = runner.stats.replays
    torch.testing.assert_close(runner(x, weight)[0], x * weight, rtol=0, atol=0)
    assert runner.stats.replays == replays + 1
    weight.data = randn(4)
    torch.testing.assert_close(runner(x, weight)[0], x * weight, rtol=0, atol=0)
    assert (runner.stats.replays, runner.stats.recaptures) == (replays + 1, 1)


def test_a_simulated_capture_builds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "prepare", lambda root: pytest.fail("asked for the extension"))
    warm(runner_of(scaled().returning(2)), randn(4), randn(4))


@pytest.mark.gpu
@pytest.mark.parametrize("cache", [True, False])
def test_a_capture_on_a_gpu_asks_for_the_extension(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: bool
) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(native, "prepare", asked.append)
    device, _ = device_for({torch.device("cuda", 0)}, simulate=False)
    assert device is not None
    runner = GraphRunner(scaled().returning(2), device, Config(cache=cache, cache_dir=str(tmp_path)))
    warm(runner, randn(4).cuda(), randn(4).cuda())
    assert asked == ([tmp_path] if cache else [])
