"""Declared dims: one program for all sizes, padded to the rungs of a ladder, and never different from the function."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphcap
from graphcap import Dim
from graphcap.compiler.breakable import due, recordings
from graphcap.compiler.breakable.rungs import Rungs
from graphcap.compiler.debug.report import RegionReport
from graphcap.compiler.frontend.subject import runners_of
from graphcap.cudagraph.hardware.simulated import SimulatedDevice
from graphcap.cudagraph.plan_capture import PlanCapture
from graphcap.errors import DimError, GuardError
from tests.compiler.breakable.like_original import breakable, num_replays
from tests.compiler.random_programs import OPERATIONS, Operation, random_program
from tests.compiler.small import Cached

LADDER = [1, 2, 4, 8]
MIXED = (3, 5, 8, 1, 7, 2)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def recorded_at(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the recordings that were made into functions, in order."""
    found: list[int] = []
    original = recordings.steps_of

    def steps_of(name: str, recording: Any, values: Any, *rest: Any) -> Any:
        found.append(next(iter(values.values())))
        return original(name, recording, values, *rest)

    monkeypatch.setattr(recordings, "steps_of", steps_of)
    return found


def padded(target: Any, dims: Any, **options: Any) -> Any:
    return breakable(target, dynamic_arg_dims=dims, **{"capture_sizes": LADDER, **options})


def region_of(captured: Any) -> RegionReport:
    (region,) = graphcap.explain(captured).regions
    assert not region.bypass
    assert not region.failures
    return region


def keys(region: RegionReport) -> set[Any]:
    return {plan.key for plan in region.plans}


class Blocks(nn.Module):
    """Row-wise, with views that are copies at some sizes and no copies at others."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.relu(self.fc(x))
        heads = h.view(x.shape[0], 2, 2).transpose(0, 1).contiguous()
        return heads.transpose(0, 1).reshape(-1, 4) * 2, h.t()


def twins(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(make())
    return models[0], models[1]


def test_every_size_up_to_40_gives_the_values_of_the_function(recorded_at: list[int]) -> None:
    original, twin = twins(Blocks)
    ladder = [1, 2, 4, 8, 16, 32, 40]
    captured = padded(twin, {"x": 0}, capture_sizes=ladder)
    for n in (*ladder, *ladder, *range(1, 41), *range(1, 41)):
        x = torch.randn(n, 4)
        torch.testing.assert_close(captured(x), original(x))
    assert sorted(recorded_at) == ladder
    region = region_of(captured)
    assert keys(region) == {(rung,) for rung in ladder}
    assert region.replays >= 80 - 2 * len(ladder)
    assert region.traffic.padded_tokens > 0
    assert not region.traffic.uncovered()
    metrics = graphcap.explain(captured).metrics()
    assert metrics["graphcap_padded_tokens_total"] == region.traffic.padded_tokens
    assert metrics[f'graphcap_rung_replays_total{{region="{region.name}",rung="32"}}'] > 30
    assert region.key_sizes == {"num_tokens": "x dim 0"}
    assert region.bindings["x"] == "padded"


@given(st.lists(st.integers(1, 12), min_size=4, max_size=24), st.integers(0, 3))
@settings(max_examples=15)
def test_any_sizes_in_any_order(sizes: list[int], seed: int) -> None:
    original, twin = twins(Blocks)
    captured = padded(twin, {"x": 0}, capture_sizes=[1, 2, 4, 8], max_padding_ratio=0.6)
    torch.manual_seed(seed)
    with torch.no_grad():
        for n in sizes:
            x = torch.randn(n, 4)
            torch.testing.assert_close(captured(x), original(x))
    assert not any(region.bypass or region.failures for region in graphcap.explain(captured).regions)


@given(OPERATIONS, st.lists(st.integers(4, 9), min_size=6, max_size=12))
@settings(max_examples=25)
def test_no_program_is_silently_wrong(operations: list[Operation], sizes: list[int]) -> None:
    """Most of these mix rows, write into what they are given or fail at some sizes: then padding is refused."""
    program = random_program(operations)
    captured = padded(program, {"x": 0, "y": 0}, capture_sizes=[6, 8])
    with torch.no_grad():
        for n in sizes:
            x, y = torch.rand(n, 4), torch.rand(n, 4)
            mine = x.clone(), y.clone()
            try:
                expected = program(x, y)
            except RuntimeError:
                with pytest.raises(RuntimeError):
                    captured(*mine)
                continue
            torch.testing.assert_close(captured(*mine), expected)
            torch.testing.assert_close(mine, (x, y))


@given(OPERATIONS, OPERATIONS, st.lists(st.integers(4, 9), min_size=6, max_size=14))
@settings(max_examples=20)
def test_no_program_around_a_live_function_is_silently_wrong(
    before: list[Operation], after: list[Operation], sizes: list[int]
) -> None:
    first, second = random_program(before), random_program(after)
    total = torch.zeros(4)

    @graphcap.eager
    def live(x: Tensor, y: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        y.mul_(0.5)
        total.add_(x[0])
        return x + y, y

    def program(x: Tensor, y: Tensor, total: Tensor) -> tuple[Tensor, ...]:
        z = first(x, y)[-1]
        return (*second(*live(z, y, total)), z)

    captured = padded(program, {"x": 0, "y": 0}, capture_sizes=[6, 8])
    mine_total = torch.zeros(4)
    with torch.no_grad():
        for n in sizes:
            x, y = torch.rand(n, 4), torch.rand(n, 4)
            mine = x.clone(), y.clone()
            before_total = total.clone()
            try:
                expected = program(x, y, total)
            except RuntimeError:
                total.copy_(before_total)
                before_mine = mine_total.clone()
                with pytest.raises(RuntimeError):
                    captured(*mine, mine_total)
                mine_total.copy_(before_mine)
                continue
            torch.testing.assert_close(captured(*mine, mine_total), expected, equal_nan=True)
            torch.testing.assert_close(mine, (x, y), equal_nan=True)
            torch.testing.assert_close(mine_total, total, equal_nan=True)


def test_a_mean_over_the_batch_is_not_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    unforeseen: list[Any] = []
    original = Rungs.add
    monkeypatch.setattr(Rungs, "add", lambda self, call, runner: unforeseen.append(0) or original(self, call, runner))
    captured = padded(lambda x: x - x.mean(0), {"x": 0})
    for _ in range(4):
        for n in MIXED:
            x = torch.randn(n, 4)
            torch.testing.assert_close(captured(x), x - x.mean(0))
    region = region_of(captured)
    assert "num_tokens is not padded: piece_0 depends on the padded size" in "".join(region.notes)
    assert keys(region) == {(n,) for n in MIXED}
    assert region.traffic.padded_tokens == 0
    assert len(unforeseen) <= 1, "sizes are recorded before the runtime comes to them, but for the first proof's own"


def test_a_scale_of_the_whole_tensor_is_not_padded() -> None:
    captured = padded(lambda x: x / x.abs().amax(), {"x": 0})
    for _ in range(4):
        for n in MIXED:
            x = torch.randn(n, 4)
            torch.testing.assert_close(captured(x), x / x.abs().amax())
    assert "mixes rows" in "".join(region_of(captured).notes)


@pytest.mark.parametrize("sizes", [(3, 5, 8, 1, 7, 2, 6), (7, 6, 8, 5, 3)])
def test_a_branch_on_the_size_is_found_at_the_first_call_of_each_size(sizes: tuple[int, ...]) -> None:
    def branches(x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] > 5 else x * 3

    captured = padded(branches, {"x": 0})
    for _ in range(6):
        for n in sizes:
            x = torch.randn(n, 4)
            torch.testing.assert_close(captured(x), branches(x))
    region = region_of(captured)
    assert "a padded replay gave another result 0" in "".join(region.notes)
    assert keys(region) >= {(n,) for n in sizes}


def test_numbers_that_follow_the_size_are_recorded_twice_at_each() -> None:
    captured = padded(lambda x: x + torch.arange(x.shape[0])[:, None], {"x": 0})
    for _ in range(4):
        for n in MIXED:
            x = torch.randn(n, 4)
            torch.testing.assert_close(captured(x), x + torch.arange(n)[:, None])
    region = region_of(captured)
    assert not region.notes
    assert keys(region) >= {(4,), (8,)}


@pytest.mark.parametrize("sizes", [MIXED, (8, 8, 8, 8, 8, 7, 5), (3, 8, 4, 8, 7)])
def test_a_number_in_the_result_that_follows_the_size_is_never_another_one(sizes: tuple[int, ...]) -> None:
    def function(x: Tensor) -> tuple[Tensor, int]:
        return x * 2, x.shape[0]

    captured = padded(function, {"x": 0})
    for _ in range(5):
        for n in sizes:
            x = torch.randn(n, 4)
            torch.testing.assert_close(captured(x), function(x))
    region = region_of(captured)
    assert any("holds other numbers" in each for each in (*region.live_calls, *region.notes))


def test_a_counter_is_no_size() -> None:
    """A factor that goes up by one from call to call would follow sizes that do."""
    numbers = iter(range(1000))
    captured = padded(lambda x: x * next(numbers), {"x": 0})
    results = [captured(torch.ones(n, 4)).unique().item() for n in range(1, 9)]
    assert results == sorted(set(results))
    (region,) = graphcap.explain(captured).regions
    assert "has other arguments in the next call" in region.bypass


DIMS = {"x": 0, "slots": 0}


def test_a_cache_is_written_once_and_padded_rows_go_where_the_fill_says() -> None:
    original, twin = twins(Cached)
    captured = padded(twin, DIMS, pad={"slots": -1})
    for _ in range(5):
        for n in MIXED:
            x, slots = torch.randn(n, 4), torch.randperm(32)[:n]
            torch.testing.assert_close(captured(x, slots), original(x, slots))
            torch.testing.assert_close(twin.cache, original.cache)
            assert torch.equal(twin.calls, original.calls)
    region = region_of(captured)
    assert keys(region) == {(1,), (2,), (4,), (8,)}
    assert region.replays >= 15


def test_a_write_at_slot_0_is_not_padded() -> None:
    original, twin = twins(Cached)
    captured = padded(twin, DIMS, pad={"slots": 0})
    for _ in range(4):
        for n in MIXED:
            x, slots = torch.randn(n, 4), torch.randperm(32)[:n]
            torch.testing.assert_close(captured(x, slots), original(x, slots))
            torch.testing.assert_close(twin.cache, original.cache)
    assert "num_tokens is not padded: piece_0 depends on the padded size" in "".join(region_of(captured).notes)


def test_where_padded_rows_are_written_must_be_said() -> None:
    original, twin = twins(Cached)
    captured = padded(twin, DIMS)
    for n in MIXED * 2:
        x, slots = torch.randn(n, 4), torch.randperm(32)[:n]
        torch.testing.assert_close(captured(x, slots), original(x, slots))
    assert "slots says where something is written: pad=" in "".join(region_of(captured).notes)


def test_arguments_that_are_written_in_place() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        x.add_(y)
        return x * 2

    captured = padded(function, {"x": 0, "y": 0})
    for n in MIXED * 4:
        x, y = torch.randn(n, 4), torch.randn(n, 4)
        mine = x.clone()
        torch.testing.assert_close(captured(mine, y), function(x, y))
        torch.testing.assert_close(mine, x)
    assert keys(region_of(captured)) == {(1,), (2,), (4,), (8,)}


def test_nested_arguments_with_two_dims() -> None:
    def function(batch: dict[str, Any], scale: float) -> dict[str, Tensor]:
        h, (weights, offsets) = batch["h"], batch["more"]
        return {"rows": h * weights[:, None, None] * scale, "columns": offsets * scale}

    dims = {"batch": {"h": {0: "batch", 1: "seq"}, "more": {"0": {0: "batch"}, "1": {0: "seq"}}}}
    captured = padded(function, dims, capture_sizes={"batch": [2, 4], "seq": [4, 8]})
    for _ in range(4):
        for rows in (3, 1, 2, 4):
            for columns in (2, 3, 7, 8):
                batch = {"h": torch.randn(rows, columns, 3), "more": [torch.randn(rows), torch.randn(columns)]}
                torch.testing.assert_close(captured(batch, 2.0), function(batch, 2.0))
    region = region_of(captured)
    assert keys(region) == {(2, 4), (2, 8), (4, 4), (4, 8)}
    assert region.bindings["batch.h"] == region.bindings["batch.more.1"] == "padded"


def test_a_dim_with_a_largest_size_is_not_in_the_key() -> None:
    def function(x: Tensor, table: Tensor) -> Tensor:
        return x + torch.where(table >= 0, table, 0).sum(1, keepdim=True)

    dims = {"x": {0: "num_reqs"}, "table": {0: "num_reqs", 1: Dim("blocks", max=16)}}
    captured = padded(function, dims, capture_sizes={"num_reqs": [2, 4, 8]}, pad={"table": -1})
    for blocks in (3, 4, 5, 6, 16, 9):
        for reqs in (3, 5, 8, 7, 2):
            x, table = torch.randn(reqs, 4), torch.randint(0, 9, (reqs, blocks))
            torch.testing.assert_close(captured(x, table), function(x, table))
    region = region_of(captured)
    assert not region.notes
    assert len(region.plans) == 3
    assert region.replays >= 15


def test_derived_sizes() -> None:
    def function(x: Tensor, starts: Tensor) -> Tensor:
        return x * (starts[1:] - starts[:-1])[:, None]

    captured = padded(function, {"x": {0: "num_reqs"}, "starts": {0: "num_reqs+1"}}, pad={"starts": "edge"})
    for n in MIXED * 4:
        x, starts = torch.randn(n, 4), torch.randint(1, 5, (n + 1,)).cumsum(0)
        torch.testing.assert_close(captured(x, starts), function(x, starts))
    assert keys(region_of(captured)) == {(1,), (2,), (4,), (8,)}


def test_sizes_of_one_name_must_agree() -> None:
    captured = padded(lambda x, y: x + y, {"x": 0, "y": 0})
    with pytest.raises(DimError, match="num_tokens"):
        captured(torch.ones(3, 4), torch.ones(1, 4))


def test_live_functions_see_padded_rows_and_their_effects_happen_once() -> None:
    seen: list[int] = []

    @graphcap.eager
    def limited(x: Tensor, total: Tensor) -> Tensor:
        seen.append(len(x))
        total.add_(1)
        return x * 2 if x.sum().item() < 1e9 else x

    captured = padded(lambda x, total: limited(x + 1, total) * 3, {"x": 0})
    total, calls = torch.zeros(2), 0
    for _ in range(5):
        for n in MIXED:
            x = torch.randn(n, 4)
            torch.testing.assert_close(captured(x, total), (x + 1) * 6)
            calls += 1
            assert torch.equal(total, torch.full((2,), float(calls)))
    region = region_of(captured)
    assert [piece.capture for piece in region.pieces] == ["always", "never", "always"]
    assert keys(region) == {(1,), (2,), (4,), (8,)}
    assert set(seen[-12:]) <= {*MIXED, *LADDER}
    assert 4 in seen[-6:]
    assert 8 in seen[-6:]


def test_sizes_beyond_the_ladder_and_with_too_much_padding_run_as_they_are() -> None:
    captured = padded(lambda x: x * 2, {"x": 0}, capture_sizes=[2, 16])
    for _ in range(4):
        for n in (2, 3, 17, 14):
            x = torch.randn(n, 4)
            torch.testing.assert_close(captured(x), x * 2)
    region = region_of(captured)
    assert keys(region) == {(2,), (16,), (3,)}
    assert region.live_calls["above the ladder, which ends at 16"] >= 2
    assert region.traffic.uncovered().keys() == {(3,), (17,)}


def test_without_declared_dims_sizes_are_exact_and_the_report_says_what_to_do() -> None:
    def function(x: Tensor) -> Tensor:
        return x * 2

    captured = breakable(function, capture_sizes=LADDER)
    for n in (3, 5) * 6:
        x = torch.randn(n, 4)
        torch.testing.assert_close(captured(x), x * 2)
    report = graphcap.explain(captured)
    assert len(report.regions) == 2
    assert "declare dynamic_arg_dims to pad" in " ".join(report.notes)
    assert num_replays(captured) >= 4


def test_a_size_that_the_function_fails_at_is_not_padded_to() -> None:
    def function(x: Tensor) -> Tensor:
        if x.shape[0] == 8:
            raise ValueError("not 8")
        return x * 2

    captured = padded(function, {"x": 0})
    for _ in range(5):
        for n in (3, 5, 6):
            x = torch.randn(n, 4)
            torch.testing.assert_close(captured(x), function(x))
    assert "num_tokens is not padded: the padded call fails: ValueError" in "".join(region_of(captured).notes)


def test_a_size_with_other_steps_is_not_captured_and_the_others_are() -> None:
    @graphcap.eager
    def limited(x: Tensor) -> Tensor:
        return x.clamp(max=1.0)

    def function(x: Tensor) -> Tensor:
        return limited(x * 2) + 1 if x.shape[0] == 8 else (x * 2).clamp(max=1.0) + 1

    captured = padded(function, {"x": 0})
    for n in (3, 4, 5, 8) * 5:
        x = torch.randn(n, 4)
        torch.testing.assert_close(captured(x), function(x))
    region = region_of(captured)
    assert keys(region) == {(4,)}
    assert region.live_calls["nothing is recorded at num_tokens=8: 3 steps, where other sizes have 1"] >= 8


def test_a_padded_call_that_cannot_be_captured_after_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs live at the padded size, and what it writes reaches the caller's tensors."""
    monkeypatch.setattr(PlanCapture, "_why_not_now", lambda self, route: "not now")

    def function(x: Tensor, y: Tensor) -> Tensor:
        x.add_(y)
        return x * 2

    captured = padded(function, {"x": 0, "y": 0})
    for n in MIXED * 4:
        x, y = torch.randn(n, 4), torch.randn(n, 4)
        mine = x.clone()
        torch.testing.assert_close(captured(mine, y), function(x, y))
        torch.testing.assert_close(mine, x)
    region = region_of(captured)
    assert region.live_calls["not now"] >= len(MIXED)
    assert not region.notes


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def test_a_changed_attribute_is_found_in_padded_calls_as_well() -> None:
    model = padded(Scaled(), {"x": 0})
    x = torch.ones(3, 4)
    for n in (3, 4, 3, 4, 3, 3, 3):
        model(torch.ones(n, 4))
    model.factor = 3.0
    call_again = (model(x) for _ in range(due.CHECK_EVERY))
    with pytest.raises(GuardError, match="does something else than when it was recorded"):
        list(call_again)
    torch.testing.assert_close(model(x), x * 3)


def test_a_replaced_parameter_is_used_at_all_sizes() -> None:
    model = padded(nn.Linear(4, 4), {"input": 0})
    for n in MIXED * 4:
        model(torch.randn(n, 4))
    model.weight = nn.Parameter(torch.zeros(4, 4))
    for n in MIXED * 4:
        torch.testing.assert_close(model(torch.randn(n, 4)), model.bias.expand(n, 4))
    assert region_of(model).recaptures == 4


def test_another_size_than_the_first_one_shows_what_follows_it(caplog: pytest.LogCaptureFixture) -> None:
    """At one size alone nothing is known of the sizes of results."""
    captured = padded(lambda x: (x * 2, x.sum(1), torch.ones(4)), {"x": 0})
    for n in (8, 8, 8, 8, 8, 5, 5, 7, 8, 6, 5):
        x = torch.randn(n, 4)
        torch.testing.assert_close(captured(x), (x * 2, x.sum(1), torch.ones(4)))
    region = region_of(captured)
    assert keys(region) == {(8,)}
    assert region.bindings["x"] == "padded"
    assert not caplog.records


def test_state_that_cannot_be_copied_is_recorded_by_calls_of_the_size_of_a_rung(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A padded call is recorded only where what it writes can be put back."""
    monkeypatch.setattr(SimulatedDevice, "spare_bytes", lambda self: 0)
    original, twin = twins(Cached)
    captured = padded(twin, DIMS, pad={"slots": -1})
    for n in (3, 5, 7, 8, 8, 8, 8, 8):
        x, slots = torch.randn(n, 4), torch.randperm(32)[:n]
        torch.testing.assert_close(captured(x, slots), original(x, slots))
        torch.testing.assert_close(twin.cache, original.cache)
        assert torch.equal(twin.calls, original.calls)
    region = region_of(captured)
    assert keys(region) == {(8,)}
    assert any("padded sizes are not recorded: a copy of what it writes takes" in each for each in region.live_calls)


def test_threads_share_a_ladder() -> None:
    captured = padded(lambda x: x * 2 + 1, {"x": 0})
    wrong: list[int] = []

    def calls(seed: int) -> None:
        sizes = torch.Generator().manual_seed(seed)
        for _ in range(60):
            n = int(torch.randint(1, 11, (), generator=sizes))
            with torch.no_grad():
                if not torch.equal(captured(torch.full((n, 4), float(seed))), torch.full((n, 4), 2.0 * seed + 1)):
                    wrong.append(n)

    threads = [threading.Thread(target=calls, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert region_of(captured).replays > 100


def test_everything_goes_with_the_model() -> None:
    model = padded(Blocks(), {"x": 0})
    for n in MIXED * 3:
        model(torch.randn(n, 4))
    (runner,) = runners_of(model)
    gone = weakref.ref(runner)
    gc.collect()
    gc.disable()
    try:
        del model, runner
        assert gone() is None
    finally:
        gc.enable()
