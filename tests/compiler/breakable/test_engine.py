"""What an engine does with a model that is captured without Dynamo: capture, dispatch, step inputs, the decorator."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import graphcap
from graphcap import GraphKey, support_graph_compile
from graphcap.compiler.breakable.target import BreakableTarget
from graphcap.compiler.debug.report import RegionReport
from graphcap.compiler.frontend.api import record_of
from graphcap.config import CUDAGraphMode
from graphcap.errors import ConfigError, StepError
from tests.compiler.breakable.like_original import breakable, num_replays
from tests.compiler.small import Cached

LADDER = [2, 4, 8]
MIXED = (3, 5, 8, 7, 2, 4)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


SETTINGS: dict[str, Any] = {"dynamic_arg_dims": {"x": 0, "slots": 0}, "pad": {"slots": -1}, "capture_sizes": LADDER}


def inputs(key: GraphKey) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    return (torch.randn(key.num_tokens, 4), torch.full((key.num_tokens,), -1)), {}


def call(model: Any, n: int) -> None:
    x, slots = torch.randn(n, 4), torch.randperm(32)[:n]
    torch.testing.assert_close(model(x, slots), model.linear(x) + x)
    torch.testing.assert_close(model.cache[slots], x)


def region_of(captured: Any) -> RegionReport:
    (region,) = graphcap.explain(captured).regions
    assert not region.bypass
    assert not region.failures
    return region


def test_the_ladder_is_captured_before_traffic_comes() -> None:
    model = breakable(Cached(), **SETTINGS)
    summary = graphcap.capture(model, inputs)
    assert [key.num_tokens for key in summary.captured] == [8, 4, 2], summary
    assert not summary.skipped
    assert torch.equal(model.calls, torch.zeros(1))
    assert not model.cache.any()
    with graphcap.allow_capture(False):
        for number, n in enumerate(MIXED * 2):
            call(model, n)
            assert model.calls.item() == number + 1
    region = region_of(model)
    assert region.replays == 2 * len(MIXED)
    assert not region.notes


def test_the_ladder_is_captured_at_the_next_call() -> None:
    model = breakable(Cached(), **SETTINGS)
    summary = graphcap.capture(model)
    call(model, 3)
    assert [key.num_tokens for key in summary.captured] == [8, 4, 2], summary
    assert model.calls.item() == 1
    before = num_replays(model)
    for n in MIXED:
        call(model, n)
    assert num_replays(model) == before + len(MIXED)
    assert model.calls.item() == 1 + len(MIXED)


def test_dispatch_knows_the_rungs() -> None:
    model = breakable(Cached(), **SETTINGS)
    assert graphcap.dispatch(model, num_tokens=3).mode is CUDAGraphMode.NONE
    graphcap.capture(model, inputs)
    decided = [graphcap.dispatch(model, num_tokens=n) for n in (2, 3, 5, 8)]
    assert [each.num_tokens for each in decided] == [2, 4, 8, 8]
    assert all(each.mode is CUDAGraphMode.FULL for each in decided)
    assert "above the ladder" in graphcap.dispatch(model, num_tokens=9).reason
    with graphcap.step(dispatch=graphcap.dispatch(model, num_tokens=3)):
        call(model, 3)
    assert region_of(model).traffic.hits() == {(4,): 1}


def test_a_sealed_process_neither_captures_nor_records() -> None:
    model = breakable(Cached(), **SETTINGS)
    call(model, 3)
    call(model, 5)
    with graphcap.allow_capture(False):
        for n in MIXED:
            call(model, n)
    region = region_of(model)
    assert not region.plans
    assert model.calls.item() == 2 + len(MIXED)
    assert sum(region.live_calls.values()) == len(MIXED)


def test_max_mode_vetoes_a_graph_for_one_step() -> None:
    model = breakable(Cached(), **SETTINGS)
    graphcap.capture(model, inputs)
    with graphcap.step(num_tokens=3, max_mode="NONE"):
        call(model, 3)
    assert region_of(model).live_calls["max_mode=NONE"] == 1
    assert num_replays(model) == 0


def test_release_and_capture_again() -> None:
    model = breakable(Cached(), **SETTINGS)
    graphcap.capture(model, inputs)
    graphcap.release(model)
    assert not region_of(model).plans
    for n in MIXED * 3:
        call(model, n)
    assert {plan.key for plan in region_of(model).plans} == {(2,), (4,), (8,)}


# -- inputs of a step --------------------------------------------------------------------------------------------------


def scaled(x: Tensor) -> Tensor:
    return x * graphcap.current_step().inputs["lens"][:, None]


@graphcap.eager
def scaled_live(x: Tensor) -> Tensor:
    lens = graphcap.current_step().inputs["lens"]
    assert len(lens) == len(x), "the op of a padded call sees padded metadata"
    return x * lens[:, None]


def both(x: Tensor) -> Tensor:
    return scaled_live(scaled(x) + 1) * 2


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (scaled, lambda x, lens: x * lens[:, None]),
        (lambda x: scaled_live(x + 1) * 2, lambda x, lens: (x + 1) * lens[:, None] * 2),
        (both, lambda x, lens: (x * lens[:, None] + 1) * lens[:, None] * 2),
    ],
)
def test_inputs_of_a_step(function: Any, expected: Any) -> None:
    captured = breakable(function, dynamic_arg_dims={"x": 0, "step.lens": {0: "num_tokens"}}, capture_sizes=LADDER)
    for turn in range(5):
        for n in MIXED:
            x, lens = torch.randn(n, 4), torch.arange(1, n + 1) * turn  # new tensors in every step
            with graphcap.step(num_tokens=n, inputs={"lens": lens}):
                torch.testing.assert_close(captured(x), expected(x, lens))
    region = region_of(captured)
    assert {plan.key for plan in region.plans} == {(2,), (4,), (8,)}
    assert region.replays >= 4 * len(MIXED) - 2 * len(LADDER)


@pytest.mark.parametrize("function", [scaled_live, both])
def test_inputs_of_a_step_are_padded_where_no_call_has_the_size_of_a_rung(function: Any) -> None:
    captured = breakable(
        lambda x: function(x) * 3,
        dynamic_arg_dims={"x": 0, "step.lens": {0: "num_tokens"}},
        capture_sizes=[8],
        pad={"step.lens": 1},
    )
    for n in (5, 6, 7) * 5:
        x, lens = torch.randn(n, 4), torch.rand(n)
        once = x * lens[:, None]
        expected = once if function is scaled_live else (once + 1) * lens[:, None] * 2
        with graphcap.step(num_tokens=n, inputs={"lens": lens}):
            torch.testing.assert_close(captured(x), expected * 3)
    region = region_of(captured)
    assert not region.notes
    assert {plan.key for plan in region.plans} == {(8,)}


def test_inputs_of_a_step_that_are_not_declared_are_exact() -> None:
    captured = breakable(scaled, dynamic_arg_dims={"x": 0}, capture_sizes=LADDER)
    for turn in range(9):
        for n in (4, 3):
            x, lens = torch.randn(n, 4), torch.arange(1, n + 1) * turn
            with graphcap.step(num_tokens=n, inputs={"lens": lens}):
                torch.testing.assert_close(captured(x), x * lens[:, None])
    assert num_replays(captured) >= 2


def test_an_input_that_a_step_may_leave_out() -> None:
    def maybe(x: Tensor) -> Tensor:
        factor = graphcap.current_step().inputs.get("factor")
        return x * 2 if factor is None else x * factor

    captured = breakable(maybe, dynamic_arg_dims={"x": 0}, capture_sizes=LADDER)
    for _ in range(6):
        for n in (3, 4):
            x, factor = torch.randn(n, 4), torch.randn(())
            with graphcap.step(num_tokens=n):
                torch.testing.assert_close(captured(x), x * 2)
            with graphcap.step(num_tokens=n, inputs={"factor": factor}):
                torch.testing.assert_close(captured(x), x * factor)
    assert num_replays(captured) >= 12
    with pytest.raises(StepError):
        captured(torch.randn(3, 4))


def test_capture_with_inputs_of_a_step() -> None:
    captured = breakable(both, dynamic_arg_dims={"x": 0, "step.lens": {0: "num_tokens"}}, capture_sizes=LADDER)

    def make(key: GraphKey) -> Any:
        return (torch.randn(key.num_tokens, 4),), {}, {"lens": torch.ones(key.num_tokens)}

    summary = graphcap.capture(captured, make)
    assert [key.num_tokens for key in summary.captured] == [8, 4, 2], summary
    for n in MIXED:
        x, lens = torch.randn(n, 4), torch.rand(n)
        with graphcap.step(num_tokens=n, inputs={"lens": lens}):
            torch.testing.assert_close(captured(x), (x * lens[:, None] + 1) * lens[:, None] * 2)
    assert region_of(captured).replays == len(MIXED)


def test_tags_with_plans_of_their_own() -> None:
    model = breakable(Cached(), specialize_tags=("lora",), **SETTINGS)
    for _ in range(5):
        for lora in (0, 1):
            with graphcap.step(num_tokens=3, tags={"lora": lora}):
                call(model, 3)
    assert len(region_of(model).plans) == 2


# -- the decorator -----------------------------------------------------------------------------------------------------


def test_the_decorator() -> None:
    @support_graph_compile(frontend="breakable", simulate=True, **SETTINGS)
    class Decorated(Cached):
        pass

    model, other = Decorated(), Decorated()
    for n in MIXED * 3:
        call(model, n)
    call(other, 3)
    assert isinstance(record_of(model), BreakableTarget)
    assert {plan.key for plan in region_of(model).plans} == {(2,), (4,), (8,)}
    assert not region_of(other).plans


def test_the_decorator_refuses_an_unknown_front_end() -> None:
    with pytest.raises(ConfigError, match="breakable"):
        support_graph_compile(frontend="jit")


def test_fallback_breakable_pads_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(gm: Any, inputs: Any, **settings: Any) -> Any:
        raise RuntimeError("the compiler is broken")

    monkeypatch.setattr("graphcap.compiler.frontend.target.backend", lambda: broken)
    model = graphcap.compile(Cached(), simulate=True, fallback="breakable", **SETTINGS)
    for n in MIXED * 3:
        call(model, n)
    assert {plan.key for plan in region_of(model).plans} == {(2,), (4,), (8,)}
