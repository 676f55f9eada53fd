"""The proof before padding: what mixes rows is refused by name, what does not is accepted, and a call counts once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from graphcap.cudagraph import Capture, Program
from graphcap.cudagraph.hardware.generators import register_generator
from graphcap.cudagraph.padded.proof import prove
from graphcap.cudagraph.program import ANY
from graphcap.cudagraph.recording.observe import observe
from tests.cudagraph.padded_regions import CPU, N, PaddedRegion, cloned, padding_of, proof_of

WIDTH = 4


@pytest.fixture(autouse=True)
def same_rows() -> None:
    torch.manual_seed(0)


def chained(*fns: Any) -> Program:
    """``[n, WIDTH] -> [n, WIDTH]`` through functions of the rows and of ``n``."""
    region = PaddedRegion()
    slot = region.rows("x", WIDTH)
    for fn in fns:
        slot = region.step(fn, slot, 0)
    return region.program(slot, sizes=[(N, WIDTH)])


def rows(num_rows: int) -> Tensor:
    return torch.randn(num_rows, WIDTH)


def norm(x: Tensor, n: int) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


WEIGHT = torch.randn(WIDTH, WIDTH)


def matmul(x: Tensor, n: int) -> Tensor:
    return x @ WEIGHT


def quantised(x: Tensor, n: int) -> Tensor:
    scale = x.abs().max() / 127
    return (x / scale).round() * scale


def minus_mean(x: Tensor, n: int) -> Tensor:
    return x - x.mean(0)


def divided(x: Tensor, n: int) -> Tensor:
    return x / n


def limited_experts(x: Tensor, n: int) -> Tensor:
    """Two experts, each with room for a quarter of the rows (one of five, two of eight); the others pass."""
    expert = (x.sum(-1) > 0).long()
    place = torch.nn.functional.one_hot(expert, 2).cumsum(0).gather(1, expert[:, None])
    return torch.where(place <= n // 4, x * (2 + expert[:, None]), x)


def nan_swallowing(x: Tensor, n: int) -> Tensor:
    """Poison in padded rows would not come through."""
    return x + torch.nan_to_num(x.sum(0)).clamp(-1, 1)


def nan_ignoring(x: Tensor, n: int) -> Tensor:
    return x - torch.fmax(x[-1], x[0])


def reversed_rows(x: Tensor, n: int) -> Tensor:
    return x.flip(0)


def row_numbers(x: Tensor, n: int) -> Tensor:
    return x + torch.arange(n)[:, None]


def masked(x: Tensor, n: int) -> Tensor:
    """The mask is of the rows themselves: finite padding times 0 is 0, where NaN would not be."""
    return x * (torch.arange(n) < n)[:, None]


CONTAMINATING = [quantised, minus_mean, divided, limited_experts, nan_swallowing, nan_ignoring, reversed_rows]


@pytest.mark.parametrize("fn", [matmul, norm, row_numbers, masked], ids=lambda fn: fn.__name__)
def test_rows_that_are_independent_are_accepted(fn: Any) -> None:
    x = rows(5)
    verdict = proof_of(chained(norm, fn, matmul), [5, x], 8)
    assert verdict.reason == ""
    torch.testing.assert_close(verdict.outputs[0], matmul(fn(norm(x, 5), 5), 5), rtol=0, atol=0)


@pytest.mark.parametrize("fn", CONTAMINATING, ids=lambda fn: fn.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_mix_are_refused_with_the_name_of_the_step(fn: Any, dtype: torch.dtype) -> None:
    """Field notes row 15: padded rows leak into real ones."""
    region = PaddedRegion()
    x = region.rows("x", WIDTH)
    before = region.step(lambda x: x * 2, x)
    after = region.step(fn, before, 0)
    program = region.program(region.step(lambda x: x + 1, after), sizes=[(N, WIDTH)])
    values = rows(5).to(dtype)
    verdict = proof_of(program, [5, values], 8)
    assert verdict.reason.startswith("step_1 "), verdict.reason
    torch.testing.assert_close(verdict.outputs[0], fn(values * 2, 5) + 1, rtol=0, atol=0)


TABLE = torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(4))


def extreme_ids(num_rows: int) -> Tensor:
    """Those whose rows are largest in magnitude: no other row, padded or not, changes a scale of all of them."""
    return TABLE.abs().amax(-1).topk(num_rows).indices


@pytest.mark.parametrize("fn", [quantised, minus_mean], ids=lambda fn: fn.__name__)
@pytest.mark.parametrize("ids", [extreme_ids(5), torch.zeros(5, dtype=torch.int64)], ids=["extreme", "zeros"])
def test_rows_that_mix_behind_a_table_are_refused_whatever_the_call_looks_up(fn: Any, ids: Tensor) -> None:
    """Field notes row 15: the ids of the call may hide what other ids would show."""
    region = PaddedRegion()
    found = region.step(lambda ids: TABLE[ids], region.rows("ids", value_bound=TABLE.shape[0]))
    program = region.program(region.step(fn, found, 0), sizes=[(N, WIDTH)])
    verdict = proof_of(program, [5, ids], 8)
    assert verdict.reason.startswith("step_1 "), verdict.reason
    torch.testing.assert_close(verdict.outputs[0], fn(TABLE[ids], 5), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("fn", "values"),
    [
        (lambda x, p: x * (p - p.min())[:, None], torch.arange(5)),  # the fill is the smallest already
        (lambda x, p: torch.where(p.all(), x, -x), torch.tensor([True, True, False, True, True])),
    ],
    ids=["smallest position", "all flags"],
)
def test_an_extreme_that_a_real_row_holds_does_not_hide_that_rows_are_mixed(fn: Any, values: Tensor) -> None:
    region = PaddedRegion()
    x, p = region.rows("x", WIDTH), region.rows("p", value_bound=ANY)
    program = region.program(region.step(fn, x, p), sizes=[(N, WIDTH)])
    verdict = proof_of(program, [5, rows(5), values], 8)
    assert verdict.reason.startswith("step_0 mixes rows"), verdict.reason


def test_rows_that_are_independent_are_accepted_behind_a_table_with_positions_and_flags() -> None:
    region = PaddedRegion()
    ids = region.rows("ids", value_bound=TABLE.shape[0])
    p, flags = region.rows("p", value_bound=ANY), region.rows("flags", value_bound=ANY)
    found = region.step(lambda ids: TABLE[ids], ids)
    end = region.step(lambda x, p, flags: torch.where(flags[:, None], x * p[:, None], x), found, p, flags)
    program = region.program(end, sizes=[(N, WIDTH)])
    args = [5, torch.zeros(5, dtype=torch.int64), torch.arange(5), torch.tensor([True, False, True, True, False])]
    assert proof_of(program, args, 8).reason == ""


def test_integers_of_unknown_meaning_get_no_values_that_the_call_does_not_hold() -> None:
    """They may be places in memory."""
    seen: set[int] = set()
    region = PaddedRegion()
    x, where = region.rows("x", WIDTH), region.rows("where")

    def look(x: Tensor, where: Tensor) -> Tensor:
        seen.update(where.tolist())
        return x * 2

    program = region.program(region.step(look, x, where), sizes=[(N, WIDTH)])
    assert proof_of(program, [5, rows(5), torch.tensor([7, 11, 13, 17, 19])], 8).reason == ""
    assert seen == {0, 7, 11, 13, 17, 19}


def test_steps_of_unknown_meaning_see_no_rows_that_are_made_up() -> None:
    """They may write them anywhere, such as into a cache that they hold."""
    seen: list[Tensor] = []
    region = PaddedRegion()
    x = region.rows("x", WIDTH)

    def unknown(x: Tensor) -> Tensor:
        seen.append(x[:5].clone())
        return x + 1

    after = region.step(unknown, region.step(lambda x: x * 2, x), capture=Capture.NEVER)
    program = region.program(region.step(lambda x: x * 3, after), sizes=[(N, WIDTH)])
    values = rows(5)
    assert proof_of(program, [5, values], 8).reason == ""
    assert len(seen) > 3
    assert all(torch.equal(each, values * 2) for each in seen)


def test_rows_that_mix_before_a_step_of_unknown_meaning_are_seen_where_it_would_see_them() -> None:
    region = PaddedRegion()
    ids, n = region.rows("ids", value_bound=TABLE.shape[0]), 0
    scaled = region.step(quantised, region.step(lambda ids: TABLE[ids], ids), n)
    attended = region.step(lambda x: x * 0, scaled, capture=Capture.NEVER)
    verdict = proof_of(region.program(attended, sizes=[(N, WIDTH)]), [5, extreme_ids(5)], 8)
    assert verdict.reason.startswith("step_1 mixes rows"), verdict.reason


def test_memory_that_a_step_of_unknown_meaning_fills_may_hold_anything_before() -> None:
    """``out = torch.empty_like(x)`` in a piece, which the attention after it writes."""
    region = PaddedRegion()
    x = region.rows("x", WIDTH)
    # What is left in memory, for one that a padded row held.
    doubled, out = region.step(lambda x: (x * 2, torch.full_like(x, float(x[-1, 0]))), x, writes=2)

    def attend(x: Tensor, out: Tensor) -> tuple[()]:
        out.copy_(x + 1)
        return ()

    region.step(attend, doubled, out, writes=0, mutates=[out], capture=Capture.NEVER)
    program = region.program(region.step(lambda out: out * 3, out), sizes=[(N, WIDTH)])
    assert proof_of(program, [5, rows(5)], 8).reason == ""


def test_rows_may_be_sorted_for_a_step_of_unknown_meaning() -> None:
    """As for experts: what is sorted depends on padded rows, what comes of it does not."""
    region = PaddedRegion()
    x, ids = region.rows("x", WIDTH), region.rows("ids", value_bound=8)
    attended = region.step(lambda x: x + 1, x, capture=Capture.NEVER)
    order = region.step(lambda ids: ids.argsort(stable=True), ids)
    experts = region.step(lambda x, order: torch.empty_like(x).index_copy_(0, order, x[order] * 2), attended, order)
    program = region.program(experts, sizes=[(N, WIDTH)])
    assert proof_of(program, [5, rows(5), torch.tensor([3, 1, 2, 1, 0])], 8).reason == ""


def test_a_model_that_fails_with_rows_that_are_alike_is_judged_by_the_others() -> None:
    region = PaddedRegion()
    x = region.rows("x", WIDTH)

    def picky(x: Tensor, n: int) -> Tensor:
        if bool((x[0] == x[1]).all()):
            raise ValueError("two rows are alike")
        return x * 2

    good = region.program(region.step(picky, x, 0), sizes=[(N, WIDTH)])
    assert proof_of(good, [5, rows(5)], 8).reason == ""
    mixing = chained(picky, minus_mean)
    assert proof_of(mixing, [5, rows(5)], 8).reason.startswith("step_1 ")


def test_a_padded_mask_is_not_relied_on() -> None:
    """Its padded rows are 0 only because nobody said otherwise."""
    region = PaddedRegion()
    x, mask = region.rows("x", WIDTH), region.rows("mask")
    total = region.step(lambda x, mask: x + (x * mask[:, None]).sum(0), x, mask)
    program = region.program(total, sizes=[(N, WIDTH)])
    assert "mixes rows" in proof_of(program, [3, rows(3), torch.ones(3)], 4).reason


def test_integers_of_a_variant_are_real_ones() -> None:
    """A table look-up never leaves the table."""
    table = torch.randn(10, WIDTH)
    region = PaddedRegion()
    ids = region.rows("ids")
    program = region.program(region.step(lambda ids: table[ids], ids), sizes=[(N, WIDTH)])
    assert proof_of(program, [3, torch.tensor([7, 8, 9])], 8).reason == ""


def test_a_declared_fill_is_kept() -> None:
    region = PaddedRegion()
    x, keep = region.rows("x", WIDTH), region.rows("keep")
    total = region.step(lambda x, keep: x + (x * (keep > 0)[:, None]).sum(0), x, keep)
    program = region.program(total, sizes=[(N, WIDTH)])
    args = [3, rows(3), torch.ones(3)]
    assert "mixes rows" in proof_of(program, args, 4).reason
    assert proof_of(program, args, 4, pad={"keep": -1}).reason == ""


# State.


def cache_program(*, write: Any, capture: Capture = Capture.ALWAYS) -> Program:
    region = PaddedRegion()
    x, slots, cache = region.rows("x", WIDTH), region.rows("slots", index=True), region.state("cache", 8, WIDTH)
    doubled = region.step(lambda x: x * 2, x)
    out = region.step(write, cache, slots, doubled, mutates=[cache], capture=capture)
    return region.program(out, sizes=[(N, WIDTH)])


def store(cache: Tensor, slots: Tensor, x: Tensor) -> Tensor:
    """A slot of -1 is not written; attention over what the cache holds then."""
    kept = slots >= 0
    cache[slots[kept]] = x[kept]
    return x + cache[slots.clamp(min=0)]


def accumulate(cache: Tensor, slots: Tensor, x: Tensor) -> Tensor:
    return x + cache.index_add_(0, slots.clamp(min=0), x * (slots >= 0)[:, None])[slots.clamp(min=0)]


@pytest.mark.parametrize("write", [store, accumulate])
@pytest.mark.parametrize("capture", [Capture.ALWAYS, Capture.NEVER])
def test_a_cache_is_written_once_and_slots_of_minus_one_are_accepted(write: Any, capture: Capture) -> None:
    program = cache_program(write=write, capture=capture)
    cache, x, slots = torch.randn(8, WIDTH), rows(3), torch.tensor([5, 1, 2])
    theirs, expected = cache.clone(), cache.clone()
    verdict = proof_of(program, [3, x, slots, theirs], 4, pad={"slots": -1})
    out = write(expected, slots, x * 2)
    assert verdict.reason == ""
    assert torch.equal(theirs, expected)
    assert torch.equal(verdict.outputs[0], out)


@pytest.mark.parametrize("write", [store, accumulate])
def test_padded_rows_that_write_a_real_slot_are_refused(write: Any) -> None:
    """Slot 0 belongs to a request of another batch: no output of this one shows that it is gone."""
    program = cache_program(write=write)
    cache = torch.randn(8, WIDTH)
    theirs, expected = cache.clone(), cache.clone()
    verdict = proof_of(program, [3, rows(3), torch.tensor([5, 1, 2]), theirs], 4, pad={"slots": 0})
    assert verdict.reason.startswith("step_1 "), verdict.reason
    assert "cache" in verdict.reason
    assert torch.equal(theirs[[0, 3, 4, 6, 7]], expected[[0, 3, 4, 6, 7]])


def test_a_constant_written_over_a_real_slot_is_refused() -> None:
    """Every variant writes the same, so that only the call itself tells."""

    def mark(cache: Tensor, slots: Tensor, x: Tensor) -> Tensor:
        cache[slots] = 1.0
        return x * 1

    verdict = proof_of(
        cache_program(write=mark), [3, rows(3), torch.tensor([5, 1, 2]), torch.zeros(8, WIDTH)], 4, pad={"slots": 0}
    )
    assert "cache" in verdict.reason


def test_what_shares_memory_with_the_cache_is_copied_with_it() -> None:
    region = PaddedRegion()
    x, keys, values = region.rows("x", WIDTH), region.state("keys", 8, WIDTH), region.state("values", 8, WIDTH)

    def write(keys: Tensor, values: Tensor, x: Tensor) -> Tensor:
        keys.add_(1)
        return x + values[0]

    program = region.program(region.step(write, keys, values, x, mutates=[keys]), sizes=[(N, WIDTH)])
    both = torch.randn(2, 8, WIDTH)
    overlapping = torch.randn(9, WIDTH)
    for keys_now, values_now in [(both[0], both[1]), (overlapping[:8], overlapping[1:])]:
        before, x_now = keys_now.clone(), rows(3)
        seen, _ = observe(program, [3, x_now, keys_now, values_now], CPU)
        verdict = prove(program, [3, x_now, keys_now, values_now], padding_of(program), {"n": 4}, seen, CPU, 2**20)
        assert verdict.reason == ""
        torch.testing.assert_close(keys_now, before + 2)  # once by observe, once by the proof
        torch.testing.assert_close(verdict.outputs[0], x_now + values_now[0], rtol=0, atol=0)


def test_too_much_state_is_a_refusal_that_says_what_to_do() -> None:
    program = cache_program(write=store)
    cache = torch.randn(8, WIDTH)
    verdict = proof_of(
        program, [3, rows(3), torch.tensor([5, 1, 2]), cache], 4, pad={"slots": -1}, max_bytes=3 * cache.nbytes - 1
    )
    assert "graphcap.capture()" in verdict.reason
    assert verdict.outputs[0].shape == (3, WIDTH)
    enough = proof_of(
        program, [3, rows(3), torch.tensor([5, 1, 2]), cache], 4, pad={"slots": -1}, max_bytes=3 * cache.nbytes
    )
    assert enough.reason == ""


def test_a_written_input_that_is_padded_itself() -> None:
    region = PaddedRegion()
    x = region.rows("x", WIDTH)
    program = region.program(region.step(lambda x: x.mul_(2).sum(-1), x, mutates=[x]), sizes=[(N,)])
    values = rows(3)
    before = values.clone()
    assert proof_of(program, [3, values], 4).reason == ""
    assert torch.equal(values, before * 2)


# Numbers, memory, randomness, failures.


def test_random_numbers_are_drawn_once() -> None:
    region = PaddedRegion()
    x = region.rows("x", WIDTH)
    drawn = region.step(lambda x: x * 1 + torch.rand(1), x)
    program = region.program(region.step(lambda x: x + 0 * torch.rand(len(x) * 99).sum(), drawn), sizes=[(N, WIDTH)])
    values = rows(3)
    torch.manual_seed(0)
    proof = proof_of(program, [3, values], 4)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    program.run(3, values)
    program.run(3, values)  # proof_of looks on at one more call
    assert proof.reason == ""
    assert torch.equal(after, torch.get_rng_state())


def test_a_registered_generator_is_put_back() -> None:
    mine = torch.Generator().manual_seed(3)
    register_generator(mine)
    program = chained(lambda x, n: x + torch.empty(1).uniform_(generator=mine))
    proof = proof_of(program, [3, rows(3)], 4)
    assert proof.reason == ""
    again = torch.Generator().manual_seed(3)
    for _ in range(2):  # proof_of looks on at one more call
        torch.empty(1).uniform_(generator=again)
    assert torch.equal(torch.rand(1, generator=mine), torch.rand(1, generator=again))


def test_random_numbers_for_each_row_are_refused() -> None:
    """In another batch size the generator gives a row other numbers, in the last rows at least."""
    program = chained(lambda x, n: x + torch.rand(n + 1, WIDTH).flip(0)[:n])
    assert proof_of(program, [3, rows(3)], 4).reason


def test_noise_is_not_taken_for_mixing() -> None:
    """Rows that differ from run to run by themselves, within what two identical runs differ."""
    program = chained(lambda x, n: x + torch.empty(n, WIDTH).uniform_(-1e-6, 1e-6, generator=NOISE))
    assert proof_of(program, [3, rows(3)], 4).reason == ""


NOISE = torch.Generator().manual_seed(0)


def test_noise_that_is_not_in_every_run_is_not_taken_for_mixing() -> None:
    """As cuDNN's attention has it on an H200: a row in seven runs of ten. Here in the first run with other padding,
    not in the first one that is as the padded run, and in the second."""
    runs: list[int] = []

    def unsteady(x: Tensor, n: int) -> Tensor:
        runs.append(n)
        return x + 1e-6 * (len(runs) in (4, 6))

    assert proof_of(chained(unsteady), [3, rows(3)], 4).reason == ""
    assert runs[1:6] == [3, 4, 4, 4, 4]  # the call, padded, with other padding, and twice the padded run again


def test_a_size_that_is_returned_is_refused() -> None:
    region = PaddedRegion()
    x = region.rows("x", WIDTH)
    program = region.program(region.step(lambda x: x + 1, x), region.step(lambda n: n * 2, 0), sizes=[(N, WIDTH), ()])
    assert "output 1" in proof_of(program, [3, rows(3)], 4).reason


def test_a_view_of_a_padded_input_is_refused_and_the_input_itself_is_not() -> None:
    region = PaddedRegion()
    x = region.rows("x", WIDTH)
    view = region.step(lambda x: x[:, 1:], x)
    values = rows(3)
    assert "shares memory with x" in proof_of(region.program(view, sizes=[(N, 3)]), [3, values], 4).reason
    whole = proof_of(region.program(x, sizes=[(N, WIDTH)]), [3, values], 4)
    assert whole.reason == ""
    assert whole.outputs[0] is values


def test_strides_that_follow_the_padded_size_are_refused() -> None:
    """A column of a wider result: its rows lie as far apart as the padded size is wide."""
    region = PaddedRegion()
    x = region.rows("x", WIDTH)
    wide = region.step(lambda x: x.t().repeat(1, 2), x)
    part = region.step(lambda w, n: w[:, :n], wide, 0)
    assert "another form" in proof_of(region.program(part, sizes=[(WIDTH, N)]), [3, rows(3)], 4).reason


def test_outputs_that_share_memory_in_one_size_only_are_refused() -> None:
    region = PaddedRegion()
    x = region.rows("x", WIDTH)
    pair = region.step(lambda x, n: (y := x + 1, y if n < 4 else y.clone()), x, 0, writes=2)
    verdict = proof_of(region.program(*pair, sizes=[(N, WIDTH), (N, WIDTH)]), [3, rows(3)], 4)
    assert "share memory with each other" in verdict.reason


def test_a_padded_call_that_fails_is_a_refusal() -> None:
    def at_most_three(x: Tensor, n: int) -> Tensor:
        if n > 3:
            raise ValueError("no more than three rows")
        return x + 1

    verdict = proof_of(chained(at_most_three), [3, x := rows(3)], 4)
    assert "no more than three rows" in verdict.reason
    assert torch.equal(verdict.outputs[0], x + 1)


def test_what_the_call_itself_raises_is_raised_and_nothing_runs_again() -> None:
    calls = []

    def fails(x: Tensor, n: int) -> Tensor:
        calls.append(n)
        raise KeyError("mine")

    program = chained(fails)
    ok = chained(lambda x, n: x)
    seen, _ = observe(ok, [3, rows(3)], CPU)
    with pytest.raises(KeyError, match="mine"):
        prove(program, [3, rows(3)], padding_of(program), {"n": 4}, seen, CPU, 2**20)
    assert calls == [3]


def test_the_verdict_knows_what_a_capture_must_know() -> None:
    program = chained(matmul)
    args = [3, rows(3)]
    verdict = proof_of(program, args, 4)
    padded = padding_of(program).pad(args, {"n": 4})
    assert verdict.seen == observe(program, cloned(padded), CPU)[0]
