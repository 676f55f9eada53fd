"""What a profile says, and that the model is afterwards as after one call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcap
from graphcap.compiler.debug import profile as profiling
from graphcap.compiler.debug import state as states
from graphcap.compiler.debug.profile import Profile, ProfileRow
from graphcap.compiler.debug.state import SavedState, reachable_tensors
from graphcap.errors import GraphcapError
from tests.compiler.small import Stack, compiled

calls: list[Tensor] = []


@graphcap.eager(fake=torch.empty_like)
def live(x: Tensor) -> Tensor:
    calls.append(x)
    return x * 2


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stack = Stack(2)
        self.register_buffer("count", torch.zeros(8))

    def forward(self, x: Tensor, cache: dict[str, Tensor]) -> Tensor:
        self.count.add_(1)
        cache["rows"].add_(x)
        return live(self.stack(x)) + self.count + torch.rand(8, device=x.device)


@pytest.fixture(autouse=True)
def _few_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "REPEATS", 3)


def profiled(model: nn.Module, *args: Any) -> Profile:
    with torch.inference_mode():
        return graphcap.profile(model, *args)


def test_every_step_is_timed_in_each_way_that_it_can_run() -> None:
    model = compiled(Counting(), simulate=True, cudagraph_mode="FULL")
    found = profiled(model, torch.ones(3, 8), {"rows": torch.zeros(3, 8)})
    assert (found.target, found.device, found.repeats, found.message) == ("Counting", "simulated", 3, "")
    by_step = {row.step: row for row in found.rows}
    assert sorted(by_step) == [f"piece_{number}" for number in range(7)]
    assert by_step.pop("piece_5").live_us
    for row in by_step.values():
        assert row.eager_us
        assert row.compiled_us
        assert row.replayed_us
        assert row.live_us is None
    assert by_step["piece_1"].where == "stack.layers.0"
    assert found.call_us > 0


def test_the_model_is_as_after_one_call() -> None:
    eager_model, model = Counting(), compiled(Counting(), simulate=True)
    eager_model.load_state_dict(model.state_dict())
    x, rows, eager_rows = torch.ones(3, 8), torch.zeros(3, 8), torch.zeros(3, 8)
    torch.manual_seed(0)
    profiled(model, x, {"rows": rows})
    after = torch.rand(1)
    torch.manual_seed(0)
    with torch.inference_mode():
        eager_model(x, {"rows": eager_rows})
    assert torch.equal(rows, eager_rows)
    assert torch.equal(model.count, eager_model.count)
    assert torch.equal(after, torch.rand(1))


def test_plans_come_back_and_live_steps_run_once_in_each_call() -> None:
    model = compiled(Counting(), simulate=True)
    x, cache = torch.ones(3, 8), {"rows": torch.zeros(3, 8)}
    with torch.inference_mode():
        for _ in range(4):
            model(x, cache)
        (runner,) = graphcap.compiler.region.all_regions()[-1].runners
        (plan,) = runner.stats.plans
        replays = plan.replays
        calls.clear()
        with graphcap.allow_capture(False):
            graphcap.profile(model, x, cache)
    assert runner.stats.plans == [plan]
    assert plan.replays == replays + 1 + 3 + 1  # found, timed, and the one at the end
    assert len(calls) == 1 + 3 + (1 + 3) + 1


def test_without_a_graph_the_profile_says_why() -> None:
    model = compiled(Counting(), cudagraph_mode="NONE")
    found = profiled(model, torch.ones(3, 8), {"rows": torch.zeros(3, 8)})
    assert not found.rows
    assert "cudagraph_mode=NONE" in found.message
    assert "cudagraph_mode=NONE" in str(found)
    assert "nothing of it was compiled" in str(profiled(nn.Linear(3, 3), torch.ones(3)))


def test_the_table_shows_where_time_was_lost_first() -> None:
    rows = (
        ProfileRow("f_0", "piece_2", "layers.0", 30.0, 10.0, 14.0, None),
        ProfileRow("f_0", "piece_1", "layers.0.attn", None, None, None, 50.0),
    )
    assert [row.lost_us for row in rows] == [4.0, 0.0]
    text = str(Profile("Model", "cuda:0", 60.0, rows, 15))
    assert "the call as it is 60.0; its steps one by one 64.0, 50.0 of them live; lost 4.0" in text
    assert "  piece_2           30.0      10.0      14.0         -       4.0  layers.0" in text.splitlines()
    assert "simulated" not in text
    assert max(map(len, text.splitlines())) <= 110


class Holder:
    __slots__ = ("kept",)

    def __init__(self, kept: Tensor) -> None:
        self.kept = kept


def test_tensors_are_found_in_containers_modules_objects_and_slots() -> None:
    module = nn.Linear(2, 2)
    module.register_buffer("seen", torch.zeros(1))
    module.cache = {"k": [torch.zeros(2), Holder(torch.zeros(3))]}
    module.cache["self"] = module
    sizes = sorted(tensor.numel() for tensor in reachable_tensors(module, (torch.zeros(4),)))
    assert sizes == [1, 2, 3, 4]


def test_views_and_inference_tensors_are_put_back() -> None:
    whole = torch.zeros(4)
    with torch.inference_mode():
        there = torch.zeros(2)
    saved = SavedState([whole[1:3], there])
    with torch.inference_mode():
        whole.add_(1)
        there.add_(1)
    saved.restore()
    assert torch.equal(whole, torch.zeros(4))
    assert torch.equal(there, torch.zeros(2))


def test_too_much_state_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "MAX_BYTES", 16)
    with pytest.raises(GraphcapError, match="use a smaller cache"):
        SavedState(torch.zeros(5))


@pytest.mark.gpu
def test_a_profile_on_a_gpu() -> None:
    model = compiled(Counting().cuda(), compiler="inductor", cudagraph_mode="FULL")
    x, cache = torch.ones(3, 8, device="cuda"), {"rows": torch.zeros(3, 8, device="cuda")}
    found = profiled(model, x, cache)
    assert found.device == "cuda:0"
    assert len(found.rows) >= 3
    assert all(row.us > 0 for row in found.rows)
    assert torch.equal(model.count, torch.ones(8, device="cuda"))
    assert torch.equal(cache["rows"], x)
