"""``@graphcap.eager`` functions and custom ops in the middle: one live step each, and every effect happens once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import graphcap
from graphcap.compiler import rules
from tests.compiler.breakable.like_original import CALLS, assert_like_original, breakable, num_replays, refused, rows

TABLE = torch.zeros(4)
ran: list[int] = []


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    ran.clear()
    TABLE.zero_()
    with torch.no_grad():
        yield


@graphcap.eager
def limited(x: Tensor, scale: float = 2.0) -> Tensor:
    ran.append(len(x))
    return x * scale if x.sum().item() < 100 else x.clamp(max=1)


@graphcap.eager
def accumulates(x: Tensor, into: Tensor) -> None:
    ran.append(len(x))
    into.add_(x.sum())
    TABLE[1:].add_(1)  # not an argument


@graphcap.eager
def noise(x: Tensor) -> Tensor:
    return x + torch.rand(4)


@torch.library.custom_op("graphcap_breakable::halve_", mutates_args=["x"])
def halve_(x: Tensor, times: int) -> Tensor:
    ran.append(times)
    x.mul_(0.5**times)
    return x.sum(0)


def around(x: Tensor) -> Tensor:
    return limited(x + 1).relu() * 2


def test_a_live_function_is_one_step_between_two_pieces() -> None:
    (region,) = assert_like_original(lambda: around, lambda i: (rows(),))
    assert [(p.capture, p.num_nodes) for p in region.pieces] == [("always", 1), ("never", 1), ("always", 2)]
    line = around.__code__.co_firstlineno + 1
    assert region.pieces[1].reason.startswith("@graphcap.eager function limited (")
    assert region.pieces[1].source.endswith(f"test_live.py:{line}")
    assert all("live" not in plan.captured for plan in region.plans)
    assert [plan.num_segments for plan in region.plans] == [2]


def test_a_live_function_sees_the_values_of_each_call() -> None:
    captured = breakable(around)
    for scale in (1.0, 1000.0, 1.0, 1000.0) * 3:
        x = torch.full((2, 4), scale)
        expected = (x + 1) * 2 if scale == 1.0 else torch.ones(2, 4)
        torch.testing.assert_close(captured(x), expected * 2)
    assert num_replays(captured) >= 4


def test_effects_happen_once_per_call() -> None:
    """Also in the calls that are recorded, that capture and that are compared with the function."""
    total = torch.zeros(4)

    def function(x: Tensor, total: Tensor) -> Tensor:
        y = x * 2
        accumulates(y, total)
        return total + TABLE

    captured = breakable(function)
    for call in range(1, 2 * CALLS):
        got = captured(torch.ones(1, 4), total)
        assert len(ran) == call
        assert torch.equal(total, torch.full((4,), 8.0 * call))
        assert torch.equal(TABLE, torch.tensor([0.0, call, call, call]))
        assert torch.equal(got, total + TABLE)
    (region,) = graphcap.explain(captured).regions
    assert region.replays >= CALLS
    assert region.pieces[1].mutates == ("total", "TABLE")


def test_a_custom_op_is_live_until_it_is_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x + 1
        return halve_(y, 2), y

    (region,) = assert_like_original(lambda: function, lambda i: (rows(),))
    assert [p.capture for p in region.pieces] == ["always", "never"]
    assert "is an opaque custom op" in region.pieces[1].reason
    assert len(ran) == 2 * CALLS
    monkeypatch.setattr(rules, "_declared", {})
    graphcap.register_op("graphcap_breakable::halve_", capture="always")
    (region,) = assert_like_original(lambda: function, lambda i: (rows(),))
    assert [p.capture for p in region.pieces] == ["always"]


def test_a_live_function_draws_as_it_does_alone() -> None:
    regions = assert_like_original(lambda: lambda x: noise(x * torch.rand(4)) + torch.rand(4), lambda i: (rows(),))
    assert regions[0].replays >= 2


def test_what_a_live_function_reads_must_be_given_to_it() -> None:
    shared: list[Any] = [None]

    @graphcap.eager
    def reads_shared() -> Tensor:
        return shared[0] * 2

    def function(x: Tensor) -> Tensor:
        shared[0] = x + 1
        y = reads_shared()
        shared[0] = None
        return y

    captured = breakable(function)
    for _ in range(CALLS):
        x = rows()
        torch.testing.assert_close(captured(x), (x + 1) * 2)
    assert "uses a value" in refused(captured)
    assert "without being given it" in refused(captured)


def test_a_number_out_of_a_live_function_is_refused() -> None:
    @graphcap.eager
    def largest(x: Tensor) -> float:
        return float(x.max())

    captured = breakable(lambda x: x / largest(x))
    for _ in range(CALLS):
        x = rows()
        torch.testing.assert_close(captured(x), x / x.max())
    assert "returns a float" in refused(captured)


def test_a_live_function_may_return_what_it_was_given() -> None:
    @graphcap.eager
    def maybe(x: Tensor) -> Tensor:
        return x.add_(1) if x.sum().item() > 0 else x * 2

    captured = breakable(lambda x: maybe(x + 0) * 3)
    for call in range(3 * CALLS):
        x = torch.full((4,), -1.0 if call % 2 else 1.0)
        torch.testing.assert_close(captured(x), torch.full((4,), -6.0 if call % 2 else 6.0))


def test_threads_share_a_target() -> None:
    captured = breakable(around)
    inputs = [torch.full((2, 4), float(i)) for i in range(4)]
    wrong: list[int] = []

    def calls(i: int) -> None:
        for _ in range(3 * CALLS):
            with torch.no_grad():
                if not torch.equal(captured(inputs[i]), (inputs[i] + 1) * 4):
                    wrong.append(i)

    threads = [threading.Thread(target=calls, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not any(region.bypass for region in graphcap.explain(captured).regions)
    assert len(ran) == 4 * 3 * CALLS
    assert num_replays(captured) >= CALLS


def test_a_live_function_outside_of_a_recording_is_the_function() -> None:
    x = rows()
    torch.testing.assert_close(limited(x, scale=3.0), x * 3)
    assert ran == [3]


def test_an_error_in_a_live_function_reaches_the_caller_and_nothing_is_left_behind() -> None:
    @graphcap.eager
    def picky(x: Tensor) -> Tensor:
        if x.sum().item() < 0:
            raise ValueError("mine")
        return x * 2

    captured = breakable(lambda x: picky(x + 0) + 1)
    good, bad = torch.ones(4), -torch.ones(4)
    for _ in range(CALLS):
        with pytest.raises(ValueError, match="mine"):
            captured(bad)
        torch.testing.assert_close(captured(good), good * 3)
    assert num_replays(captured) >= 2
