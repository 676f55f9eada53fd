"""A padded call step by step: which rows are looked at, and how much is run to know their sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from graphcap.cudagraph import Capture, Program
from graphcap.cudagraph.padded.by_steps import ByStep, exact_sizes, first_given_away, results
from tests.cudagraph.padded_regions import N, PaddedRegion

WIDTH = 4


def counted(fn: Callable[[Tensor], Any], calls: list[int], number: int) -> Callable[[Tensor], Any]:
    def call(*args: Tensor) -> Any:
        calls.append(number)
        return fn(*args)

    return call


def layers(calls: list[int]) -> Program:
    """``piece, attention, piece``, twice; a piece makes rows and one number, and attention is of unknown meaning."""
    region = PaddedRegion()
    slot = region.rows("x", WIDTH)
    for layer in range(2):
        pair = region.step(counted(lambda x: (x * 2, x.sum()), calls, 2 * layer), slot, writes=2)
        slot = region.step(counted(lambda x, _: x + 1, calls, 2 * layer + 1), *pair, capture=Capture.NEVER)
    return region.program(region.step(counted(lambda x: x * 3, calls, 4), slot), sizes=[(N, WIDTH)])


def test_what_the_first_step_of_unknown_meaning_reads_is_looked_at_and_nothing_else() -> None:
    program = layers([])
    rows, total = program.steps[0].writes
    assert first_given_away(program) == {rows, total}
    sizes = {rows: torch.Size([3, WIDTH]), total: torch.Size([])}
    kept, _ = ByStep(program, [5, torch.ones(5, WIDTH)]).run([5, torch.ones(5, WIDTH)], sizes, torch.clone)
    assert kept.keys() == {rows}, "a number has no rows that padding adds to"
    assert torch.equal(kept[rows], torch.full((3, WIDTH), 2.0))


def test_a_result_whose_size_follows_what_rows_hold_has_no_rows_to_look_at() -> None:
    region = PaddedRegion()
    x = region.rows("x", WIDTH)
    some = region.step(lambda x: x[x[:, 0] > 0], x)
    region.step(lambda some: some.sum() and (), some, writes=0, capture=Capture.NEVER)
    program = region.program(region.step(lambda x: x * 2, x), sizes=[(N, WIDTH)])
    by_step = ByStep(program, [5, torch.ones(5, WIDTH)])
    others = torch.ones(5, WIDTH)
    others[0] = -1
    for rows, found in ((torch.ones(5, WIDTH), {some}), (others, set())):
        kept, _ = by_step.run([5, rows], {some: torch.Size([3, WIDTH])}, torch.clone)
        assert kept.keys() == found


def test_the_exact_size_is_run_no_further_than_needed() -> None:
    calls: list[int] = []
    program = layers(calls)
    args = [3, torch.ones(3, WIDTH)]
    assert [*exact_sizes(program, args, first_given_away(program)).values()].count(torch.Size([3, WIDTH])) == 1
    assert calls == [0]
    calls.clear()
    assert exact_sizes(program, args, ()) == {}
    assert calls == []
    exact_sizes(program, args, results(program))
    assert calls == [0, 1, 2, 3, 4]


def test_a_step_of_unknown_meaning_runs_with_the_rows_of_the_call_alone() -> None:
    calls: list[int] = []
    by_step = ByStep(layers(calls), [5, torch.ones(5, WIDTH)])
    calls.clear()
    _, outputs = by_step.run([5, torch.zeros(5, WIDTH)], {}, torch.clone)
    assert calls == [0, 2, 4]
    assert torch.equal(outputs[0], torch.full((5, WIDTH), 21.0)), "it made 7 of the call's rows, and does so again"


def test_memory_that_a_later_step_writes_is_no_result() -> None:
    region = PaddedRegion()
    x = region.rows("x", WIDTH)
    made, out = region.step(lambda x: (x * 2, torch.empty_like(x)), x, writes=2)
    region.step(lambda x, out: out.copy_(x) and (), made, out, writes=0, mutates=[out], capture=Capture.NEVER)
    program = region.program(region.step(lambda out: out * 3, out), sizes=[(N, WIDTH)])
    assert results(program) == {made, *program.steps[2].writes}
    assert first_given_away(program) == {made}
