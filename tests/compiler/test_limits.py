"""Sizes without an example have a bound in compiled code, and are right beyond it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import graphcap
from graphcap.compiler import limits, private
from graphcap.cudagraph import Constant, InputKind, InputSpec, Step

SETTINGS: dict[str, Any] = {"simulate": True, "cache": False, "capture_after": 2}


class Rows(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.linear = nn.Linear(4, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.linear(x)) + x.sum(-1, keepdim=True)


@pytest.fixture
def bounded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The bounds that are given, as (symbol, largest)."""
    given: list[tuple[str, int]] = []
    original = private.bound_symbol

    def bound_symbol(mode: Any, symbol: Any, largest: int) -> bool:
        given.append((str(symbol), largest))
        return original(mode, symbol, largest)

    monkeypatch.setattr(private, "bound_symbol", bound_symbol)
    return given


def run(model: nn.Module, compiled: nn.Module, size: int) -> None:
    x = torch.randn(size, 4)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), Rows.forward(model, x))  # type: ignore[arg-type]


@pytest.mark.parametrize(("width", "expected"), [(8, 2**20), (2**15, 2**15)])
def test_the_bound_follows_from_the_widest_tensor(width: int, expected: int, bounded: list[tuple[str, int]]) -> None:
    model = Rows(width)
    compiled = graphcap.compile(model, dynamic_arg_dims={"x": 0}, compiler="eager", **SETTINGS)
    run(model, compiled, 3)
    assert [largest for _, largest in bounded] == [expected]


def test_calls_beyond_the_bound_are_traced_once_more_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_BOUNDS", [16])
    model = Rows()
    compiled = graphcap.compile(model, dynamic_arg_dims={"x": 0}, compiler="eager", **SETTINGS)
    for size in (4, 4, 4, 17, 17, 17, 40, 16, 4, 1, 400):
        run(model, compiled, size)
    bounded, free = graphcap.explain(compiled).regions
    assert all(plan.key[0] <= 16 for plan in bounded.plans)
    assert bounded.replays
    assert free.live_calls


def test_a_program_is_right_beyond_its_bound_where_nobody_guards_it() -> None:
    def compiled_code(x: torch.Tensor) -> tuple[torch.Tensor]:
        raise AssertionError("compiled code beyond its bound")

    step = Step("piece_0", compiled_code, (0,), (2,), eager=lambda x: (x * 2,))
    inputs = (InputSpec("x", InputKind.TENSOR), InputSpec("n", InputKind.SCALAR, symbol="u0", in_key=True))
    run = limits.within_bounds(lambda x, n: compiled_code(x), {"u0": 2}, inputs, [step], (2, Constant("end")))
    doubled, end = run(torch.ones(3), 3)
    assert (doubled.tolist(), end) == ([2, 2, 2], "end")
    with pytest.raises(AssertionError, match="beyond its bound"):
        run(torch.ones(2), 2)


def test_an_example_needs_no_bound(bounded: list[tuple[str, int]]) -> None:
    model = Rows()
    compiled = torch.compile(model, backend="graphcap", dynamic=True, options={"compiler": "eager", **SETTINGS})
    with torch.no_grad():
        compiled(torch.randn(3, 4))
    assert bounded == []


def test_two_sizes_have_no_bound(bounded: list[tuple[str, int]]) -> None:
    def product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x @ y.t()

    compiled = graphcap.compile(product, dynamic_arg_dims={"x": {0: "n"}, "y": {0: "m"}}, compiler="eager", **SETTINGS)
    x, y = torch.randn(3, 4), torch.randn(5, 4)
    torch.testing.assert_close(compiled(x, y), x @ y.t())
    assert bounded == []


def test_inductor_is_told_a_usual_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one it takes a product of rows and columns to be 8192, and chooses kernels for that."""
    seen: list[dict[Any, int]] = []
    original = private.bound_symbol

    def bound_symbol(mode: Any, symbol: Any, largest: int) -> bool:
        seen.append({str(key): hint for key, hint in mode.shape_env.var_to_hint_override.items()})
        return original(mode, symbol, largest)

    monkeypatch.setattr(private, "bound_symbol", bound_symbol)
    model = Rows()
    run(model, graphcap.compile(model, dynamic_arg_dims={"x": 0}, compiler="eager", **SETTINGS), 3)
    assert [list(hints.values()) for hints in seen] == [[64]]
