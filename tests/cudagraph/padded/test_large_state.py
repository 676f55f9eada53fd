"""A proof beside a cache that no copy has room for: the same verdict, within the pages that the call writes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphcap.cudagraph import Program
from graphcap.cudagraph.hardware.thin_cpu import CpuPages
from graphcap.cudagraph.padded.blame import trace
from graphcap.cudagraph.padded.proof import Verdict, prove
from graphcap.cudagraph.padded.scratch import Scratch
from graphcap.cudagraph.recording.observe import observe
from tests.cudagraph.padded_regions import CPU, N, PaddedRegion, cloned, padding_of, proof_of

WIDTH = 4
PAGE = CpuPages.page_bytes
ROWS = 64 * PAGE // (4 * WIDTH)  #: of a cache of 64 pages of float32
ROWS_OF_A_PAGE = ROWS // 64
PLENTY = 2**30


def room_for(num_rows: int, num_writers: int = 1) -> int:
    """Bytes that are enough for the proof of a call that writes so many rows, whatever it could write."""
    return 8 * PAGE * (num_writers * num_rows + 4)


def store(cache: Tensor, slots: Tensor, x: Tensor) -> Tensor:
    """What an attention does: rows of -1 are written nowhere."""
    kept = slots >= 0
    cache[slots[kept]] = x[kept]
    return x + cache[slots.clamp(min=0)] * kept[:, None]


def accumulate(cache: Tensor, slots: Tensor, x: Tensor) -> Tensor:
    """Run twice, it does something else than once."""
    kept = slots >= 0
    return x + cache.index_add_(0, slots[kept], x[kept])[slots.clamp(min=0)] * kept[:, None]


def by_address(cache: Tensor, slots: Tensor, x: Tensor) -> Tensor:
    """An op with a layout of its own: torch knows nothing of its rows."""
    flat = cache.as_strided((cache.numel(),), (1,), cache.storage_offset())
    kept = slots >= 0
    places = (slots[kept, None] * WIDTH + torch.arange(WIDTH)).flip(-1)
    flat[places] = x[kept]
    return x * 2


def astray(cache: Tensor, slots: Tensor, x: Tensor) -> Tensor:
    """A padded row writes the last row of the cache, as an index of -1 does."""
    cache[slots] = x
    return x * 2


def at_the_start(cache: Tensor, slots: Tensor, x: Tensor) -> Tensor:
    cache[slots.clamp(min=0)] = x
    return x * 2


def one_row_less(cache: Tensor, slots: Tensor, x: Tensor) -> Tensor:
    """In a larger batch a real row is lost."""
    kept = slots >= 0
    kept[:1] &= bool(kept.all())
    cache[slots[kept]] = x[kept]
    return x * 2


def wiped_when_padded(cache: Tensor, slots: Tensor, x: Tensor) -> Tensor:
    if bool((slots < 0).any()):
        cache.zero_()
    return store(cache, slots, x)


def by_the_batch(cache: Tensor, slots: Tensor, x: Tensor) -> Tensor:
    return store(cache, slots, x / x.abs().max())


def to_nobody(cache: Tensor, slots: Tensor, x: Tensor) -> Tensor:
    """The last row belongs to nobody and only ever gets zeros."""
    cache[slots] = x * (slots >= 0)[:, None]
    return x + cache[slots]


FAITHFUL = [store, accumulate, by_address]
UNFAITHFUL = [astray, at_the_start, one_row_less, wiped_when_padded, by_the_batch]


def program_of(*writers: Any) -> Program:
    """``x`` through one writer after the other, each with a cache of its own."""
    region = PaddedRegion()
    slot, slots = region.rows("x", WIDTH), region.rows("slots", index=True)
    caches = [region.state(f"cache_{number}", ROWS, WIDTH) for number in range(len(writers))]
    for cache, writer in zip(caches, writers, strict=True):
        slot = region.step(writer, cache, slots, slot, mutates=[cache])
    return region.program(slot, sizes=[(N, WIDTH)])


def call_of(rows: Sequence[int], num_caches: int = 1, seed: int = 0) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    caches = [torch.randn(ROWS, WIDTH, generator=generator) for _ in range(num_caches)]
    return [len(rows), torch.randn(len(rows), WIDTH, generator=generator) + 3, torch.tensor(rows), *caches]


def verdict_of(
    program: Program,
    args: list[Any],
    rung: int,
    max_bytes: int,
    beside: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Verdict:
    seen, _ = observe(program, cloned(args), CPU)
    padding = padding_of(program, pad={"slots": -1})
    return prove(program, args, padding, {"n": rung}, seen, CPU, max_bytes, beside=beside)


rows_of_a_call = st.lists(st.integers(1, ROWS - 2), min_size=2, max_size=7, unique=True)


@given(st.lists(st.sampled_from(FAITHFUL + UNFAITHFUL), min_size=1, max_size=3), rows_of_a_call)
@settings(max_examples=40)
def test_the_state_is_that_of_the_call_alone_and_the_verdict_that_of_copies(writers: Any, rows: list[int]) -> None:
    """In memory that depends on the rows which are written, and not on the size of the caches."""
    program, args = program_of(*writers), call_of(rows, len(writers))
    alone, copied = cloned(args), cloned(args)
    expected = program.run(*alone)
    with_copies = verdict_of(program, copied, 8, PLENTY)
    max_bytes = room_for(len(rows), len(writers))
    assert max_bytes < 3 * sum(cache.nbytes for cache in args[3:]) / 2
    verdict = verdict_of(program, args, 8, max_bytes)
    assert not verdict.is_open, verdict.reason
    assert all(torch.equal(a, b) for a, b in zip(args[1:], alone[1:], strict=True))
    assert torch.equal(verdict.outputs[0], expected[0])
    assert bool(verdict.reason) == bool(with_copies.reason) == bool(set(writers) & set(UNFAITHFUL)), (
        verdict.reason, with_copies.reason
    )  # fmt: skip


@pytest.mark.parametrize("writer", UNFAITHFUL)
def test_the_step_and_the_cache_are_named(writer: Any) -> None:
    verdict = verdict_of(program_of(store, writer), call_of([5, 2000, 9], 2), 4, room_for(3, 2))
    assert verdict.reason.startswith("step_1 "), verdict.reason


def test_a_row_hit_in_the_page_of_a_real_one_is_seen() -> None:
    """All rows of the call are in one page, as is the one that is hit."""
    verdict = verdict_of(program_of(astray), call_of([ROWS - 3, ROWS - 2]), 4, room_for(2))
    assert "what is left in cache_0" in verdict.reason


@pytest.mark.parametrize("shape", [(ROWS, WIDTH), (2, ROWS // 2, WIDTH), (ROWS // 16, 2, 8, WIDTH)])
@pytest.mark.parametrize("row_of_nobody", [0.0, 1.0])
def test_a_row_that_belongs_to_nobody_may_get_what_it_has(shape: tuple[int, ...], row_of_nobody: float) -> None:
    """As in the examples, and wherever an engine keeps its null block."""
    region = PaddedRegion()
    x, slots = region.rows("x", WIDTH), region.rows("slots", index=True)
    cache = region.state("cache", *shape)
    parts = len(shape) == 3

    def write(cache: Tensor, slots: Tensor, x: Tensor) -> Tensor:
        for half in cache if parts else [cache.view(-1, WIDTH)]:
            to_nobody(half, slots, x)
        return x * 2

    program = region.program(region.step(write, cache, slots, x, mutates=[cache]), sizes=[(N, WIDTH)])
    n, rows, places, _ = call_of([3, 400])
    values = torch.randn(shape)
    for half in values if parts else [values.view(-1, WIDTH)]:
        half[-1] = row_of_nobody
    args = [n, rows, places, values]
    assert bool(verdict_of(program, args, 4, PLENTY).reason) == bool(row_of_nobody)
    verdict = verdict_of(program, args, 4, room_for(4))
    assert bool(verdict.reason) == bool(row_of_nobody)
    assert not verdict.is_open


def test_no_room_for_the_pages_of_a_call_says_what_to_do_and_serves_it() -> None:
    rows = [number * ROWS_OF_A_PAGE for number in range(1, 33)]
    program, args = program_of(accumulate), call_of(rows)
    alone = cloned(args)
    program.run(*alone)
    verdict = verdict_of(program, args, 40, room_for(3))
    assert verdict.is_open
    assert "indices that point nowhere" in verdict.reason
    assert torch.equal(args[-1], alone[-1])
    assert verdict_of(program, call_of([-1] * 32), 40, room_for(3)).reason == ""


def test_views_of_one_cache_are_one_cache_in_every_run() -> None:
    """Keys and values in one tensor, as engines keep them."""
    region = PaddedRegion()
    x, slots = region.rows("x", WIDTH), region.rows("slots", index=True)
    keys, values = region.state("keys", ROWS, WIDTH), region.state("values", ROWS, WIDTH)
    both = region.state("both", 2, ROWS, WIDTH)

    def write(keys: Tensor, values: Tensor, both: Tensor, slots: Tensor, x: Tensor) -> Tensor:
        store(keys, slots, x)
        store(values, slots, -x)
        return x + both[:, slots.clamp(min=0)].sum(0)

    step = region.step(write, keys, values, both, slots, x, mutates=[keys, values, both])
    program = region.program(step, sizes=[(N, WIDTH)])
    n, rows, places, _ = call_of([3, 2000])
    cache = torch.randn(2, ROWS, WIDTH)
    args = [n, rows, places, cache[0], cache[1], cache]
    alone = cache.clone()
    expected = write(alone[0], alone[1], alone, places, rows)
    seen, _ = observe(program, [n, rows, places, (other := cache.clone())[0], other[1], other], CPU)
    padding = padding_of(program, pad={"slots": -1})
    verdict = prove(program, args, padding, {"n": 4}, seen, CPU, room_for(4))
    assert verdict.reason == ""
    assert torch.equal(cache, alone)
    assert torch.equal(verdict.outputs[0], expected)


def test_a_small_counter_beside_a_large_cache_stands_where_it_stood() -> None:
    """It says where in the cache the next row goes: a run that begins with a later one would leave the cache."""
    region = PaddedRegion()
    x = region.rows("x", WIDTH)
    place, cache = region.state("place", 1), region.state("cache", ROWS, WIDTH)

    def append(place: Tensor, cache: Tensor, x: Tensor) -> Tensor:
        cache[int(place)] = 1.0
        place += 1
        return x * 2

    program = region.program(region.step(append, place, cache, x, mutates=[place, cache]), sizes=[(N, WIDTH)])
    args = [3, torch.randn(3, WIDTH), torch.tensor([ROWS - 1]), torch.randn(ROWS, WIDTH)]
    seen, _ = observe(program, cloned(args), CPU)
    verdict = prove(program, args, padding_of(program), {"n": 4}, seen, CPU, room_for(1))
    assert verdict.reason == ""
    assert int(args[2]) == ROWS


def test_large_integers_are_not_stood_in_for() -> None:
    """They may say where something is."""
    region = PaddedRegion()
    x, table = region.rows("x", WIDTH), region.state("table", ROWS, WIDTH)
    step = region.step(lambda table, x: (table[:1].add_(1), x * 2)[1], table, x, mutates=[table])
    program = region.program(step, sizes=[(N, WIDTH)])
    args = [3, torch.randn(3, WIDTH), torch.zeros(ROWS, WIDTH, dtype=torch.int64)]
    verdict = proof_of(program, args, 4, max_bytes=room_for(1))
    assert verdict.is_open
    assert verdict.reason.startswith(f"the proof needs {3 * args[-1].nbytes} bytes")


def test_a_call_that_is_finite_only_with_its_own_cache_is_left_undecided() -> None:
    """Where all is NaN, two runs agree too easily."""

    def root(cache: Tensor, slots: Tensor, x: Tensor) -> Tensor:
        store(cache, slots, x)
        return x * cache.sqrt().sum()

    program = program_of(root)
    n, x, slots, cache = call_of([3, 4])
    args = [n, x.abs(), slots, cache.abs()]
    verdict = verdict_of(program, args, 4, room_for(2))
    assert verdict.is_open
    assert "output 0 is not finite" in verdict.reason
    assert verdict_of(program, args, 4, PLENTY).reason == ""


def test_a_call_that_fails_with_another_cache_is_left_undecided() -> None:
    def picky(cache: Tensor, slots: Tensor, x: Tensor) -> Tensor:
        if float(cache[ROWS // 2, 0]) != 42:
            raise ValueError("what is this")
        return store(cache, slots, x)

    args = call_of([3, 4])
    args[-1][ROWS // 2, 0] = 42
    verdict = verdict_of(program_of(picky), args, 4, room_for(2))
    assert verdict.is_open
    assert "stood in for: ValueError: what is this" in verdict.reason


def test_random_numbers_are_drawn_once_all_the_same() -> None:
    def noisy(cache: Tensor, slots: Tensor, x: Tensor) -> Tensor:
        return store(cache, slots, x + torch.rand(1))

    program, args = program_of(noisy), call_of([3, 4])
    alone = cloned(args)
    torch.manual_seed(0)
    expected = program.run(*alone)
    after = torch.get_rng_state()
    seen, _ = observe(program, cloned(args), CPU)
    torch.manual_seed(0)
    padding = padding_of(program, pad={"slots": -1})
    verdict = prove(program, args, padding, {"n": 4}, seen, CPU, room_for(2))
    assert verdict.reason == ""
    assert torch.equal(torch.get_rng_state(), after)
    assert torch.equal(args[-1], alone[-1])
    assert torch.equal(verdict.outputs[0], expected[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2])
def test_a_cache_in_bytes_begins_with_small_numbers_in_every_format(dtype: torch.dtype) -> None:
    """Numbers of more than one kind may be packed into it."""
    begun = []

    def packed(cache: Tensor, slots: Tensor, x: Tensor) -> Tensor:
        begun.append(cache.view(dtype)[ROWS // 2].double().abs())
        cache[slots[slots >= 0]] = 1
        return x * 2

    program, (n, x, slots, _) = program_of(packed), call_of([3, 4])
    args = [n, x, slots, torch.full((ROWS, 8 * WIDTH), 255, dtype=torch.uint8)]
    assert verdict_of(program, args, 4, room_for(2)).reason == ""
    assert len(begun) > 3
    assert all(float(each.min()) > 0 and float(each.max()) < 1 for each in begun[2:])


@given(st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=20, unique=True), st.integers(1, 63))
@settings(max_examples=30)
def test_a_run_finds_every_row_as_it_has_written_it(rows: list[int], pages_apart: int) -> None:
    """Also where rows are in the same place of their pages. What it has not written is as before the run."""
    rows = list(dict.fromkeys([*rows, 5, 5 + pages_apart * ROWS_OF_A_PAGE]))
    program, args = program_of(store), call_of(rows)
    _, x, slots, _ = args
    seen, _ = observe(program, cloned(args), CPU)
    scratch = Scratch(program, seen, args, room_for(len(rows)))
    program.run(*args)
    scratch.look_again()
    stage = scratch.stage()
    before = stage.arguments(args)[-1].clone()
    again = stage.arguments(args)
    assert torch.equal(before, again[-1])
    program.run(*again)
    assert torch.equal(again[-1][slots], x)
    before[slots] = x
    assert torch.equal(again[-1], before)


def test_two_stages_have_nothing_in_common() -> None:
    program, args = program_of(store), call_of([3, 4])
    seen, _ = observe(program, cloned(args), CPU)
    scratch = Scratch(program, seen, args, room_for(2))
    scratch.look_again()
    first, second = scratch.stage().arguments(args)[-1], scratch.stage().arguments(args)[-1]
    before = second.clone()
    first.zero_()
    assert torch.equal(second, before)
    assert not torch.equal(args[-1], before)


@pytest.mark.parametrize("max_bytes", [PLENTY, room_for(2)], ids=["copied", "stood in for"])
def test_in_inference_mode(max_bytes: int) -> None:
    with torch.inference_mode():
        args = call_of([3, 4])
        alone = cloned(args)
        program = program_of(accumulate)
        program.run(*alone)
        assert verdict_of(program, args, 4, max_bytes).reason == ""
        assert torch.equal(args[-1], alone[-1])


def test_a_cache_that_is_returned_is_not_copied_for_the_blame() -> None:
    region = PaddedRegion()
    x, cache = region.rows("x", WIDTH), region.state("cache", ROWS, WIDTH)
    whole = region.step(lambda cache, x: cache.mul_(2), cache, x, mutates=[cache])
    program = region.program(region.step(lambda c, x: x + c[0], whole, x), sizes=[(N, WIDTH)])
    made = trace(program, [3, torch.ones(3, WIDTH), torch.ones(ROWS, WIDTH)], None)
    ((nothing,), (rows,)) = made.results
    assert nothing is None
    assert torch.equal(rows, torch.full((3, WIDTH), 3.0))


class Ranks:
    """Two threads that decide together; both must ask the same."""

    is_group = True

    def __init__(self) -> None:
        self._barrier = threading.Barrier(2, timeout=60)
        self._said: dict[int, tuple[str, Any]] = {}

    def gather(self, question: str, mine: Any, usual: Any = None) -> list[Any]:
        self._said[threading.get_ident()] = question, mine
        self._barrier.wait()
        said = list(self._said.values())
        self._barrier.wait()
        assert len({asked for asked, _ in said}) == 1
        return [answer for _, answer in said]

    def reason(self, question: str, mine: str) -> str:
        return mine or next((each for each in self.gather(question, mine) if each), "")


@pytest.mark.parametrize("writer", [store, astray])
def test_ranks_run_as_often_as_each_other_where_one_has_no_room_for_copies(writer: Any) -> None:
    """A collective that one rank runs more often is a hang."""
    runs: dict[int, int] = {}

    def counting(cache: Tensor, slots: Tensor, x: Tensor) -> Tensor:
        runs[threading.get_ident()] = runs.get(threading.get_ident(), 0) + 1
        return writer(cache, slots, x)

    program, ranks = program_of(counting), Ranks()
    padding = padding_of(program, pad={"slots": -1})

    def rank(max_bytes: int) -> Verdict:
        args = call_of([3, 4])
        seen, _ = observe(program, cloned(args), CPU)
        return prove(program, args, padding, {"n": 4}, seen, CPU, max_bytes, agreement=ranks)

    with ThreadPoolExecutor(2) as pool:
        verdicts = list(pool.map(rank, [PLENTY, room_for(2)]))
    assert len(set(runs.values())) == 1
    assert len(runs) == 2
    assert [bool(verdict.reason) for verdict in verdicts] == [writer is astray] * 2
    assert not any(verdict.is_open for verdict in verdicts)
