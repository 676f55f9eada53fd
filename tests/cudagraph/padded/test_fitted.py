"""A padded plan serves every size up to its rung, in any order, beside other plans, and is what eager is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphcap.cudagraph import Capture, Program, Size
from graphcap.cudagraph.replaying.plan import Unfit
from tests.cudagraph.padded_regions import LIVE, N, PaddedCalls, PaddedRegion, cloned

WIDTH = 3


def rows(num_rows: int) -> Tensor:
    return torch.randn(num_rows, WIDTH)


def all_kinds(live: Capture) -> Program:
    """Captured and possibly live steps over rows, cumulative lengths, a cache and an accumulator that is padded."""
    region = PaddedRegion()
    x, total = region.rows("x", WIDTH), region.rows("total", WIDTH)
    starts = region.rows("starts", size=Size("n", 1, 1))
    slots, cache = region.rows("slots", index=True), region.state("cache", 16, WIDTH)

    def attend(cache: Tensor, slots: Tensor, x: Tensor, n: int) -> Tensor:
        assert x.shape[0] == slots.shape[0] == n, "live steps see one size"
        kept = slots >= 0
        cache.index_put_((slots.clamp(min=0),), torch.where(kept[:, None], x, cache[slots.clamp(min=0)]))
        return x + cache[slots.clamp(min=0)]

    doubled = region.step(lambda x: x * 2, x)
    attended = region.step(attend, cache, slots, doubled, 0, mutates=[cache], capture=live)
    lengths = region.step(lambda starts: starts.diff(), starts)
    pairs = region.step(lambda a, b: ((base := a + b)[:, 1:], base[:, :1]), attended, doubled, writes=2)
    region.step(lambda total, a: total.add_(a).sum(), total, attended, mutates=[total], capture=live)
    half = region.step(lambda total: total[:, 1:], total, capture=live)
    region.step(lambda half: half.mul_(1.5).sum(), half, mutates=[half])
    summed = region.step(lambda total: total * 2, total)
    turned = region.step(lambda a: a.t().contiguous(), attended, capture=live)
    return region.program(
        *(attended, lengths, *pairs, x, turned, summed),
        sizes=[(N, WIDTH), (N,), (N, WIDTH - 1), (N, 1), (N, WIDTH), (WIDTH, N), (N, WIDTH)],
    )


FILLS = {"slots": -1, "starts": "edge", "total": 5}


def call_of(n: int, cache: Tensor) -> list[Any]:
    starts = torch.randint(1, 5, (n + 1,)).cumsum(0)
    return [n, rows(n), rows(n), starts, torch.randperm(15)[:n] + 1, cache]  # slot 0 is nobody's


def same_as_eager(calls: PaddedCalls, args: list[Any], run: Any) -> None:
    theirs = cloned(args)
    expected, got = calls.program.run(*theirs), run(*args)
    for mine, true in zip((*got, *args), (*expected, *theirs), strict=True):
        torch.testing.assert_close(mine, true, rtol=0, atol=0)
        if isinstance(mine, Tensor) and mine.numel() and all(size > 1 for size in mine.shape):
            assert mine.stride() == true.stride()
    assert got[4] is args[1]


@pytest.mark.parametrize("live", [Capture.ALWAYS, LIVE])
@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(1, 8), min_size=1, max_size=14), largest_first=st.booleans())
def test_any_order_of_sizes_is_what_eager_is(live: Capture, sizes: list[int], largest_first: bool) -> None:
    calls, cache = PaddedCalls(all_kinds(live), pad=FILLS), torch.randn(16, WIDTH)
    for rung in sorted([2, 4, 8], reverse=largest_first):
        args = call_of(max(1, rung - 1), cache)
        same_as_eager(calls, args, lambda *args, rung=rung: calls.capture({"n": rung}, args))
    kept = []
    for n in sizes:
        args = call_of(n, cache)
        same_as_eager(calls, args, calls)
        kept.append((outputs := calls(*args), cloned(outputs)))
    for outputs, copies in kept:
        assert all(map(torch.equal, outputs, copies)), "a later call wrote into what an earlier one returned"
    assert not calls.mismatches


def plain(fill: Any = 0, live: Capture = Capture.ALWAYS) -> tuple[PaddedCalls, list[Tensor]]:
    """A program that shows what its last step sees, rung 4 captured."""
    seen: list[Tensor] = []

    def look(x: Tensor) -> Tensor:
        seen.append(x.clone())
        return x + 1

    region = PaddedRegion()
    x = region.rows("x", WIDTH)
    program = region.program(region.step(look, region.step(lambda x: x * 1, x), capture=live), sizes=[(N, WIDTH)])
    calls = PaddedCalls(program, pad={"x": fill})
    calls.capture({"n": 4}, [3, rows(3)])
    return calls, seen


@pytest.mark.parametrize("fill", [0, -7.0, "edge"])
def test_padded_rows_hold_the_fill_in_every_replay(fill: Any) -> None:
    calls, seen = plain(fill, LIVE)
    for n in (1, 4, 2, 2, 3, 1):
        x = rows(n)
        calls(n, x)
        rest = x[-1:] if fill == "edge" else torch.full((1, WIDTH), float(fill))
        torch.testing.assert_close(seen[-1], torch.cat([x, rest.expand(4 - n, -1)]), rtol=0, atol=0)


def test_constants_are_not_written_again_for_the_same_size() -> None:
    calls, _ = plain(-7, LIVE)
    plan = calls.plans[(4,)]
    fit, other = plan.fit({"n": 2}), plan.fit({"n": 3})
    written = []
    for name, each in (("two", fit), ("three", other)):
        fill = each.__globals__["fill_once"]
        each.__globals__["fill_once"] = lambda name=name, fill=fill: (written.append(name), fill())
    for each, n in ((fit, 2), (fit, 2), (other, 3), (fit, 2), (fit, 2)):
        with torch.no_grad():
            each((n, rows(n)))
    assert written == ["two", "three", "two"]


def test_a_replay_that_fails_half_way_leaves_nobody_as_holder() -> None:
    seen: list[Tensor] = []
    fails: list[bool] = []

    def fill(tensor: Tensor, size: torch.Size) -> None:
        if fails:
            raise KeyError("mine")
        tensor[size[0] :] = 1

    region = PaddedRegion()
    x, y = region.rows("x", WIDTH), region.rows("y", WIDTH)
    out = region.step(lambda x, y: (seen.append(x.clone()), x + y)[1], x, y, capture=LIVE)
    calls = PaddedCalls(region.program(region.step(lambda a: a * 1, out), sizes=[(N, WIDTH)]), pad={"x": -7, "y": fill})
    calls.capture({"n": 4}, [3, rows(3), rows(3)])
    calls(2, rows(2), rows(2))
    fails.append(True)
    with pytest.raises(KeyError, match="mine"):
        calls(3, rows(3), rows(3))
    fails.clear()
    calls(2, rows(2), rows(2))
    assert bool((seen[-1][2:] == -7).all())


@pytest.mark.parametrize("fill", [-7, "edge"])
def test_padded_rows_that_a_step_writes_are_filled_again(fill: Any) -> None:
    seen: list[Tensor] = []
    region = PaddedRegion()
    x = region.rows("x", WIDTH)
    before = region.step(lambda x: (seen.append(x.clone()), x * 1)[1], x)
    region.step(lambda x, before: x.copy_(before * 2).sum(), x, before, mutates=[x])
    calls = PaddedCalls(region.program(before, sizes=[(N, WIDTH)]), pad={"x": fill})
    calls.capture({"n": 4}, [3, rows(3)])
    for _ in range(3):
        x_now = rows(2)
        rest = (x_now[-1:] if fill == "edge" else torch.full((1, WIDTH), -7.0)).expand(2, -1).clone()
        calls(2, x_now)
        torch.testing.assert_close(seen[-1][2:], rest, rtol=0, atol=0)


def test_an_exact_plan_in_between_costs_the_padding_nothing_but_a_refill() -> None:
    """Both copy into the same memory."""
    calls, seen = plain(-7)
    exact = calls.capture_exact([2, rows(2) + 3])
    assert calls.arena.buffers([rows(4)])[1].data_ptr() == calls.plans[(4,)].recorded.blocks[0].data_ptr()
    for n in (1, 1, 3):
        x = rows(n)
        torch.testing.assert_close(calls(n, x)[0], x + 1, rtol=0, atol=0)
        assert bool((seen[-1][n:] == -7).all())
        with torch.no_grad():
            torch.testing.assert_close(exact.fit({"n": 2})((2, y := rows(2)))[0], y + 1, rtol=0, atol=0)


def test_the_rung_itself_is_the_plain_replay_and_fits_are_kept() -> None:
    calls, _ = plain()
    plan = calls.plans[(4,)]
    assert plan.fit({"n": 4}) is plan.replay
    assert plan.fit({"n": 2}) is plan.fit({"n": 2})
    assert plan.fit({"n": 2}).__code__ is plan.replay.__code__


def test_an_argument_of_another_size_is_not_served() -> None:
    calls, _ = plain()
    with torch.no_grad():
        fit = calls.plans[(4,)].fit({"n": 2})
        assert fit((2, rows(3))) is Unfit.CHANGED
        assert fit((2, rows(2).double())) is Unfit.CHANGED


def test_rows_of_any_layout_are_copied_in() -> None:
    calls, _ = plain()
    x = torch.randn(WIDTH, 5).t()[1:4]
    torch.testing.assert_close(calls(3, x)[0], x + 1, rtol=0, atol=0)


@pytest.mark.parametrize("live", [Capture.ALWAYS, LIVE])
def test_a_padded_input_in_memory_that_is_written_is_not_served(live: Capture) -> None:
    """The copy would not see what a step writes into the original."""
    region = PaddedRegion()
    x, cache = region.rows("x", WIDTH), region.state("cache", 8, WIDTH)
    out = region.step(lambda cache, x: cache.add_(1)[:1] + x, cache, x, mutates=[cache], capture=live)
    out = region.step(lambda out: out * 1, out)
    calls = PaddedCalls(region.program(out, sizes=[(N, WIDTH)]))
    state = torch.randn(8, WIDTH)
    calls.capture({"n": 4}, [3, rows(3), state])
    with torch.no_grad():
        assert calls.plans[(4,)].fit({"n": 2})((2, state[:2], state)) is Unfit.CHANGED
    before = state.clone()
    (result,) = calls(2, x_now := rows(2), state)
    torch.testing.assert_close(result, before[:1] + 1 + x_now, rtol=0, atol=0)


def test_a_live_step_that_changes_its_mind_ends_the_call_live() -> None:
    """The rest of the padded call runs without graphs; the caller gets real rows, and its tensors are written."""
    wide: list[bool] = []

    def fickle(x: Tensor) -> Tensor:
        return torch.cat([x, x]) if wide else x * 2

    region = PaddedRegion()
    x, total = region.rows("x", WIDTH), region.rows("total", WIDTH)
    made = region.step(fickle, x, capture=LIVE)
    out = region.step(lambda a, total, n: total.add_(1) + a[:n], made, total, 0, mutates=[total])
    calls = PaddedCalls(region.program(out, sizes=[(N, WIDTH)]))
    calls.capture({"n": 4}, [3, rows(3), rows(3)])
    wide.append(True)
    x_now, total_now = rows(2), rows(2)
    expected = total_now + 1
    (result,) = calls(2, x_now, total_now)
    torch.testing.assert_close(total_now, expected, rtol=0, atol=0)
    torch.testing.assert_close(result, expected + x_now, rtol=0, atol=0)
    assert len(calls.mismatches) == 1


def test_two_dims_and_a_buffer_of_the_largest_size() -> None:
    region = PaddedRegion()
    region.size("b")
    table, x = region.rows("table", Size("b")), region.rows("x", WIDTH)
    out = region.step(lambda t, x: x + t[:, :1], table, x)
    program = region.program(out, sizes=[(N, WIDTH)], largest={"b": 6})
    calls = PaddedCalls(program)
    calls.capture({"n": 4, "b": 6}, [2, 3, torch.randn(2, 3), rows(2)])
    for n, b in ((1, 6), (3, 2), (4, 1), (3, 2)):
        t, x_now = torch.randn(n, b), rows(n)
        torch.testing.assert_close(calls(n, b, t, x_now)[0], x_now + t[:, :1], rtol=0, atol=0)
