"""The runner on calls that may be padded: proven once, then any size is served by a rung, or live with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from graphcap.cudagraph import InputKind, InputSpec, Program, Size
from tests.cudagraph.padded_regions import LIVE, N, PaddedRegion, cloned
from tests.cudagraph.regions import runner_of

WIDTH = 3
LADDER = [4, 8]


def rows(num_rows: int, *rest: int) -> Tensor:
    return torch.randn(num_rows, *(rest or (WIDTH,)))


def assert_served(runner: Any, program: Program, args: list[Any]) -> None:
    theirs = cloned(args)
    expected = program.run(*theirs)
    for mine, true in zip((*runner(*args), *args), (*expected, *theirs), strict=True):
        torch.testing.assert_close(mine, true, rtol=0, atol=0)


def rowwise(live: bool = False) -> Program:
    region = PaddedRegion()
    x = region.rows("x", WIDTH)
    out = region.step(lambda x: x * 2, region.step(lambda x: x + 1, x, **({"capture": LIVE} if live else {})))
    return region.program(out, sizes=[(N, WIDTH)])


def test_sizes_that_were_never_seen_are_replayed() -> None:
    program = rowwise()
    runner = runner_of(program, capture_sizes=LADDER)
    for n in (3, 3, 3, 6, 6, 6):
        assert_served(runner, program, [n, rows(n)])
    replays = runner.stats.replays
    for n in (1, 2, 4, 5, 7, 8, 2):
        assert_served(runner, program, [n, rows(n)])
    served = runner.stats.replays - replays
    assert served >= 5, runner.stats  # the smallest sizes may be too much padding
    assert {plan.key for plan in runner.stats.plans} >= {(4,), (8,)}


def test_a_program_that_mixes_rows_runs_at_its_exact_sizes() -> None:
    region = PaddedRegion()
    x = region.rows("x", WIDTH)
    program = region.program(region.step(lambda x: x - x.mean(0), x), sizes=[(N, WIDTH)])
    runner = runner_of(program, capture_sizes=LADDER)
    for n in (3, 3, 3, 3, 3, 4, 4, 4, 2, 3):
        assert_served(runner, program, [n, rows(n)])
    assert "mixes rows" in runner.padding.refused["n"] or "depends on the padded size" in runner.padding.refused["n"]


def test_a_number_that_follows_a_name_which_no_dim_has() -> None:
    """``starts`` is ``num_reqs+1`` long, and nothing is ``num_reqs`` long."""
    region = PaddedRegion()
    starts = Size("_reqs_", 1, 1)
    region.specs[0] = InputSpec("starts.size().0", InputKind.SCALAR, symbol="_reqs_ + 1", in_key=True, sizes=(starts,))
    slot = region.rows("starts", size=starts, dim_names={0: "num_reqs"})
    program = region.program(region.step(lambda s: s * 2, slot), sizes=[(starts,)])
    runner = runner_of(program, capture_sizes={"num_reqs": LADDER}, pad={"starts": "edge"})
    for n in (3, 3, 3, 3, 4, 2, 3, 2):
        assert_served(runner, program, [n + 1, torch.arange(n + 1)])
    assert runner.stats.plans[0].key == (4,)
    assert runner.stats.replays >= 4, runner.stats


def test_a_padded_tensor_with_another_size_that_stays_exact() -> None:
    region = PaddedRegion()
    region.size("m")
    x, y = region.rows("x", Size("m"), dim_names={0: "n"}), region.rows("y", WIDTH)
    wide = region.step(lambda x: x + 1, x)
    program = region.program(wide, region.step(lambda y: y * 2, y), sizes=[(N, Size("m")), (N, WIDTH)])
    runner = runner_of(program, capture_sizes={"n": LADDER, "m": [5]})
    assert runner.padding.names == {"n": "n"}
    for n, m in [(3, 5)] * 4 + [(2, 5), (4, 5), (3, 6), (3, 5), (2, 6)]:
        assert_served(runner, program, [n, m, rows(n, m), rows(n)])
    assert runner.stats.replays >= 3, runner.stats


def test_a_size_without_a_ladder_stays_exact_and_others_are_padded() -> None:
    region = PaddedRegion()
    region.size("m")
    x, y = region.rows("x", Size("m"), dim_names={0: "n"}), region.rows("y", WIDTH)
    wide = region.step(lambda x: x + 1, x)
    program = region.program(wide, region.step(lambda y: y * 2, y), sizes=[(N, Size("m")), (N, WIDTH)])
    runner = runner_of(program, capture_sizes={"n": LADDER})
    for n, m in [(3, 5), (3, 6)] * 4 + [(2, 5), (4, 5), (2, 6)]:
        assert_served(runner, program, [n, m, rows(n, m), rows(n)])
    assert {plan.key for plan in runner.stats.plans} == {(4, 5), (4, 6)}
    assert runner.stats.replays >= 4, runner.stats


def test_rows_that_are_mixed_only_where_another_size_is_not_one() -> None:
    """A transpose of a column is the column: what was proven there says nothing about two columns."""
    region = PaddedRegion()
    region.size("m")
    x = region.rows("x", Size("m"), dim_names={0: "n"})
    program = region.program(region.step(lambda x: x.t().reshape(x.shape) + 0, x), sizes=[(N, Size("m"))])
    runner = runner_of(program, capture_sizes={"n": [4], "m": [1, 2]})
    for n, m in [(3, 1)] * 5 + [(3, 2)] * 5 + [(2, 1), (2, 2)]:
        x_ = rows(n, m)
        (out,) = runner(n, m, x_)
        torch.testing.assert_close(out, x_.t().reshape(n, m))
    assert "mixes rows" in runner.padding.refused["n"] or "depends on the padded size" in runner.padding.refused["n"]


@pytest.mark.parametrize("live", [False, True])
def test_rows_that_are_mixed_only_where_a_number_is_not_zero(live: bool) -> None:
    region = PaddedRegion()
    k, x = region.size("k"), region.rows("x", WIDTH)
    mixed = region.step(lambda x, k: x + k * x.mean(0), x, k, **({"capture": LIVE} if live else {}))
    program = region.program(region.step(lambda m: m * 2, mixed), sizes=[(N, WIDTH)])
    runner = runner_of(program, capture_sizes={"n": LADDER})
    for n, number in [(3, 0)] * 5 + [(3, 2)] * 5 + [(2, 0), (2, 3), (3, 3)]:
        assert_served(runner, program, [n, number, rows(n)])
    assert "mixes rows" in runner.padding.refused["n"] or "depends on the padded size" in runner.padding.refused["n"]


def test_a_live_result_whose_other_size_varies_is_cut_in_the_padded_dim_only() -> None:
    region = PaddedRegion()
    x, width = region.rows("x", WIDTH), region.state("width", 1)
    doubled = region.step(lambda x: x * 2, x)
    out = region.step(lambda x, w: x.repeat(1, int(w)), doubled, width, capture=LIVE)
    program = region.program(out, doubled, sizes=[(N, Size("later")), (N, WIDTH)])
    runner = runner_of(program, capture_sizes=LADDER, cudagraph_mode="PIECEWISE")
    for n, w in [(3, 1)] * 4 + [(3, 2), (2, 3), (4, 2), (2, 1), (3, 5)]:
        assert_served(runner, program, [n, rows(n), torch.tensor([w])])
    assert runner.stats.replays >= 4, runner.stats


def counting(mixes: bool = False) -> Program:
    """Counts its calls in a tensor, which a proof has to copy."""
    region = PaddedRegion()
    x, calls = region.rows("x", WIDTH), region.state("calls", 1, kind=InputKind.STATIC)

    def count(x: Tensor, calls: Tensor) -> Tensor:
        calls += 1
        return x - x.mean(0) if mixes else x * 2

    return region.program(region.step(count, x, calls, mutates=[calls]), sizes=[(N, WIDTH)])


def test_a_proof_for_which_there_was_no_memory_is_tried_again_when_asked_for() -> None:
    program, calls = counting(), torch.zeros(1)
    runner = runner_of(program, capture_sizes=LADDER)
    spare, runner.device.spare_bytes = runner.device.spare_bytes, lambda: 0
    for n in (3, 3, 3, 3, 3, 4, 4, 4, 4):
        assert_served(runner, program, [n, rows(n), calls])
    (note,) = runner.padding.notes
    assert "n is not padded: the proof needs 12 bytes" in note
    assert {plan.key for plan in runner.stats.plans} == {(3,), (4,)}
    runner.reconsider()
    assert_served(runner, program, [3, rows(3), calls])
    assert runner.padding.refused, "there is no more memory than before"
    runner.device.spare_bytes = spare
    runner.reconsider()
    assert (runner.padding.notes, runner.stats.plans) == ((), [])
    for n in (3, 3, 3, 3, 2):
        assert_served(runner, program, [n, rows(n), calls])
    assert {plan.key for plan in runner.stats.plans} == {(4,)}
    assert runner.stats.replays >= 2


def test_a_proof_that_ran_out_of_memory_is_tried_again_when_asked_for() -> None:
    full = True

    def add(x: Tensor) -> Tensor:
        if full and len(x) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x + 1

    region = PaddedRegion()
    program = region.program(region.step(add, region.rows("x", WIDTH)), sizes=[(N, WIDTH)])
    runner = runner_of(program, capture_sizes=LADDER)
    for _ in range(2):
        assert_served(runner, program, [3, rows(3)])
    assert "out of memory" in runner.padding.refused["n"]
    full = False
    runner.reconsider()
    for _ in range(4):
        assert_served(runner, program, [3, rows(3)])
    assert {plan.key for plan in runner.stats.plans} == {(4,)}


def test_rows_that_are_mixed_are_never_tried_again() -> None:
    program, calls = counting(mixes=True), torch.zeros(1)
    runner = runner_of(program, capture_sizes=LADDER)
    for _ in range(3):
        assert_served(runner, program, [3, rows(3), calls])
    (reason,) = runner.padding.refused.values()
    runner.reconsider()
    assert runner.padding.refused == {"n": reason}


def encoder(mixes_seq: bool = False) -> Program:
    """``x [batch, seq, WIDTH]``, row-wise in the batch, and along the sequence unless that is asked otherwise."""
    region = PaddedRegion()
    region.specs[0] = InputSpec("b", InputKind.SCALAR, symbol="b", in_key=True)
    region.size("s")
    batch, seq = Size("b"), Size("s")
    x = region.rows("x", seq, WIDTH, size=batch, dim_names={0: "batch", 1: "seq"})
    out = region.step(lambda x: x - x.mean(1, keepdim=True) if mixes_seq else x * 2, x)
    return region.program(out, sizes=[(batch, seq, WIDTH)])


GRID = {"batch": [2, 4], "seq": [8, 16]}


def call(runner: Any, program: Program, batch: int, seq: int) -> None:
    assert_served(runner, program, [batch, seq, rows(batch, seq, WIDTH)])


def test_each_padded_dim_has_to_prove_itself() -> None:
    """A call that is short in one dim shows nothing about the other."""
    program = encoder(mixes_seq=True)
    runner = runner_of(program, capture_sizes=GRID)
    for _ in range(4):
        call(runner, program, 3, 16)
    assert not runner.padding.refused
    for _ in range(3):
        call(runner, program, 3, 13)
    assert runner.padding.refused


def test_a_grid_of_sizes_serves_every_size_in_it() -> None:
    program = encoder()
    runner = runner_of(program, capture_sizes=GRID)
    for key in runner.router.ladder.batches():
        for _ in range(3):
            call(runner, program, key.size("batch"), key.size("seq"))
    call(runner, program, 3, 13)
    replays = runner.stats.replays
    for batch, seq in [(1, 5), (2, 8), (3, 8), (4, 9), (2, 16)]:
        call(runner, program, batch, seq)
    assert runner.stats.replays == replays + 5
    assert {plan.key for plan in runner.stats.plans} == {(2, 8), (2, 16), (4, 8), (4, 16)}
