"""A function whose kernels round differently from run to run, as some do, and which carries that far."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import graphcap
from graphcap.compiler import rules
from graphcap.compiler.breakable import due
from graphcap.cudagraph.checks.differences import TOLERANCES
from graphcap.errors import GuardError
from tests.compiler.breakable.like_original import CALLS, breakable, num_replays

runs: list[int] = []


@torch.library.custom_op("graphcap_breakable::unsteady", mutates_args=[])
def unsteady(x: Tensor) -> Tensor:
    """Its second run, its fourth and so on are off by a last bit."""
    runs.append(1)
    return x * (1 + len(runs) % 2 * torch.finfo(x.dtype).eps)


@pytest.fixture(autouse=True)
def _declared(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(rules, "_declared", {})
    graphcap.register_op("graphcap_breakable::unsteady", capture="always")
    unsteady(torch.zeros(1))  # what torch makes of an operator at its first call is over
    runs.clear()
    with torch.no_grad():
        yield


def doubling(depth: int, factor: list[float]) -> Callable[[Tensor, Tensor], Tensor]:
    """A map that doubles, again and again, what rounding has left; ``state`` becomes its last value but one."""

    def function(x: Tensor, state: Tensor) -> Tensor:
        y = unsteady(x)
        for _ in range(depth):
            y = 4 * y * (1 - y)
        state.copy_(y)
        return y * factor[0]

    return function


def call_often(captured: Callable[[Tensor, Tensor], Tensor], state: Tensor, calls: int) -> None:
    for _ in range(calls):
        assert torch.equal(captured(torch.rand(16, 64), state), state)


def test_replays_go_on_where_rounding_moves_values_far() -> None:
    captured = breakable(doubling(10, [1.0]))
    state, twin_state, apart = torch.zeros(16, 64), torch.zeros(16, 64), 0.0
    for _ in range(2 * due.CHECK_EVERY):
        x = torch.rand(16, 64)
        got = captured(x, state)
        assert torch.equal(got, state)  # of one run, whichever it was
        apart = max(apart, (got - doubling(10, [1.0])(x, twin_state)).abs().max().item())
    assert apart > 5 * TOLERANCES[torch.float32]
    (region,) = graphcap.explain(captured).regions
    assert not region.bypass
    assert not region.unchecked
    assert num_replays(captured) == 2 * due.CHECK_EVERY - 4


def test_a_changed_number_is_found_where_rounding_moves_values_far() -> None:
    factor = [1.0]
    captured = breakable(doubling(10, factor))
    state = torch.zeros(16, 64)
    call_often(captured, state, CALLS)
    factor[0] = 2.0
    call_until_checked = functools.partial(call_often, captured, state, due.CHECK_EVERY)
    with pytest.raises(GuardError, match="aten::mul"):
        call_until_checked()


def test_what_rounding_changes_altogether_is_not_compared_and_the_report_says_so() -> None:
    captured = breakable(doubling(40, [1.0]))
    state = torch.zeros(16, 64)
    call_often(captured, state, CALLS)
    (region,) = graphcap.explain(captured).regions
    assert not region.bypass
    assert "rounding alone changes result 0" in region.unchecked["replays against the function"]
    assert num_replays(captured) == CALLS - 4
