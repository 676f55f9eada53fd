"""``frontend=`` and ``fallback=``: who looks at a function, and what happens when Dynamo cannot."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcap
from graphcap.compiler.breakable.target import BreakableTarget
from graphcap.compiler.frontend.api import record_of
from graphcap.errors import ConfigError
from tests.compiler.breakable.like_original import CALLS, num_replays, rows


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def broken_backend(gm: Any, inputs: Any, **settings: Any) -> Any:
    raise RuntimeError("the compiler is broken")


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo cannot make anything of any function."""
    monkeypatch.setattr("graphcap.compiler.frontend.target.backend", lambda: broken_backend)


def double(x: Tensor) -> Tensor:
    return x * 2


@pytest.mark.usefixtures("no_compiler")
def test_by_default_the_original_runs_and_breakable_is_recommended() -> None:
    compiled = graphcap.compile(double, simulate=True)
    x = rows()
    with pytest.warns(UserWarning, match="frontend='breakable'"):
        torch.testing.assert_close(compiled(x), x * 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(compiled(x), x * 2)
    report = str(graphcap.explain(compiled))
    assert "frontend='breakable'" in report
    assert "the compiler is broken" in " ".join(report.split())


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 4), lambda: double])
def test_fallback_breakable(make: Any) -> None:
    torch.manual_seed(0)
    original = make()
    torch.manual_seed(0)
    compiled = graphcap.compile(make(), simulate=True, fallback="breakable")
    for _ in range(CALLS):
        x = rows()
        torch.testing.assert_close(compiled(x), original(x), rtol=0, atol=0)
    assert num_replays(compiled) == CALLS - 4
    assert "captured without" in " ".join(graphcap.explain(compiled).notes)


def breaks(x: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return x * 2


def test_a_graph_break_under_fullgraph_stays_an_error_unless_a_fallback_is_asked_for() -> None:
    with pytest.raises(torch._dynamo.exc.Unsupported):
        graphcap.compile(breaks, fullgraph=True, simulate=True)(rows())
    compiled = graphcap.compile(breaks, fullgraph=True, simulate=True, fallback="breakable")
    for _ in range(CALLS):
        x = rows()
        torch.testing.assert_close(compiled(x), x * 2)
    assert num_replays(compiled) == CALLS - 4


def test_errors_of_the_function_are_no_reason_to_fall_back() -> None:
    def fails(x: Tensor) -> Tensor:
        raise ValueError("mine")

    for fallback in ("eager", "breakable"):
        compiled = graphcap.compile(fails, simulate=True, compiler="eager", fallback=fallback)
        for _ in range(3):
            with pytest.raises(ValueError, match="mine"):
                compiled(rows())


def test_an_unknown_front_end_is_refused() -> None:
    with pytest.raises(ConfigError, match="breakable"):
        graphcap.compile(double, frontend="jit")


def test_the_front_end_is_part_of_the_request() -> None:
    model = nn.Linear(4, 4)
    graphcap.compile(model, frontend="breakable")
    record = record_of(model)
    assert isinstance(record, BreakableTarget)
    assert record_of(graphcap.compile(model, frontend="breakable")) is record
    assert not isinstance(record_of(graphcap.compile(model)), BreakableTarget)


def test_dynamo_is_never_called(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("Dynamo was called")

    monkeypatch.setattr(torch, "compile", never)
    model = graphcap.compile(nn.Linear(4, 4), frontend="breakable", simulate=True)
    for _ in range(CALLS):
        model(rows())
    assert num_replays(model) == CALLS - 4


def test_a_compiled_module_inside_becomes_part_of_the_recording() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = graphcap.compile(nn.Linear(4, 4), frontend="breakable", simulate=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).relu()

    model = graphcap.compile(Outer(), frontend="breakable", simulate=True)
    for _ in range(CALLS):
        x = rows()
        torch.testing.assert_close(model(x), torch.relu(x @ model.inner.weight.t() + model.inner.bias))
    assert num_replays(model) == CALLS - 4


def test_switches_that_stop_everything() -> None:
    model = graphcap.compile(nn.Linear(4, 4), frontend="breakable", simulate=True)
    with graphcap.disabled():
        model(rows())
    assert not graphcap.explain(model).regions
    eager = graphcap.compile(nn.Linear(4, 4), frontend="breakable", enforce_eager=True)
    eager(rows())
    assert not graphcap.explain(eager).regions
    uncaptured = graphcap.compile(nn.Linear(4, 4), frontend="breakable", simulate=True, cudagraph_mode="NONE")
    for _ in range(CALLS):
        uncaptured(rows())
    (region,) = graphcap.explain(uncaptured).regions
    assert region.replays == 0
    assert "cudagraph_mode=NONE" in region.no_capture
