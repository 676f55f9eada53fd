"""A segment run again on copies: the same values, no effect."""

from __future__ import annotations

import pytest
import torch

from graphcap.cudagraph.checks.rehearsal import Segment, TooLarge, segments_of
from graphcap.cudagraph.checks.rounding import spread
from tests.cudagraph.regions import LIVE, Region, randn, runner_of, warm


def writing():
    """Two captured steps write two views of one cache and a state of their own; a live one stands between."""
    region = Region()
    left, right, x = region.tensor("left"), region.tensor("right"), region.tensor("x")
    a = region.step(lambda left, x: left.add_(x) * 1, left, x, mutates=[left])
    b = region.step(lambda a, right: right.mul_(2) + a, a, right, mutates=[right])
    live = region.step(lambda b: b + 1, b, capture=LIVE)
    return region.returning(region.step(lambda live: live * 3, live), b)


def captured():
    memory = torch.ones(300)
    left, right = memory[3:6], memory[200:203]
    runner = runner_of(writing())
    warm(runner, left, right, randn(3))
    return next(iter(runner._table.plans.values())).recorded, memory


def test_the_segments_of_a_plan():
    recorded, _ = captured()
    assert segments_of(recorded) == [[0, 1], [3]]


def test_a_plan_keeps_what_captured_steps_were_given_and_nothing_that_they_made():
    recorded, _ = captured()
    assert sorted(recorded.given) == [0, 1, 2, 5]  # the inputs, and the result of the live step


def test_what_a_segment_writes_stays_as_it_is_until_the_rehearsal_takes_effect():
    recorded, memory = captured()
    before = memory.clone()
    rehearsal = Segment(recorded, [0, 1]).rehearse(2**20)
    assert torch.equal(memory, before)
    x = recorded.stand_ins[2]
    expected = before.clone()
    expected[3:6] += x
    expected[200:203] *= 2
    found = {outcome.what: outcome.expected for outcome in rehearsal}
    assert torch.equal(found["what it wrote into input left"], expected[3:6])
    assert torch.equal(found["what it wrote into input right"], expected[200:203])
    assert torch.equal(found["result 0"], expected[200:203] + expected[3:6])
    assert [outcome.step for outcome in rehearsal] == [0, 1, 1]
    assert rehearsal[0].what == "what it wrote into input left"
    rehearsal.take_effect()
    assert torch.equal(memory, expected)
    assert torch.equal(recorded.constants[4], found["result 0"])


def test_a_nudged_rehearsal_moves_values_a_little_and_nothing_that_lasts():
    table = torch.rand(4096) + 1  # what a step returns without having made it
    region = Region()
    state, x = region.tensor("state"), region.tensor("x")
    looked_up = region.step(lambda x: table, x)
    y = region.step(lambda s, t: s.add_(t) * 1, state, looked_up, mutates=[state])
    runner = runner_of(region.returning(region.step(lambda y: y.view(64, 64), y)))
    state, x, before = torch.ones(4096), randn(3), table.clone()
    warm(runner, state, x)
    state_before = state.clone()
    segment = Segment(next(iter(runner._table.plans.values())).recorded, [0, 1, 2])
    settled, moved = segment.rehearse(2**20), segment.rehearse_nudged(2**20)
    assert torch.equal(table, before)
    assert torch.equal(state, state_before)
    assert [each.what for each in moved] == [each.what for each in settled]
    gaps = [spread(one.expected, other.expected) for one, other in zip(settled, moved, strict=True)]
    assert all(0 < gap < 1e-6 for gap in gaps), gaps


def test_views_that_lie_apart_are_copied_apart():
    recorded, _ = captured()
    segment = Segment(recorded, [0, 1])
    copies = [outcome.expected for outcome in segment.rehearse(2**20) if "wrote" in outcome.what]
    assert [copy.untyped_storage().nbytes() for copy in copies] == [24, 812 - 512]  # from a multiple of 512 bytes on
    with pytest.raises(TooLarge, match="writes into 0 MiB"):
        segment.rehearse(24 + 300 - 1)


def test_views_that_overlap_share_their_copy():
    region = Region()
    whole, part = region.static("whole"), region.static("part")
    a = region.step(lambda whole: whole.add_(1).sum(), whole, mutates=[whole])
    program = region.returning(region.step(lambda part, a: part.mul_(a) + 0, part, a, mutates=[part]))
    memory = torch.ones(4)
    runner = runner_of(program)
    for _ in range(3):
        runner(memory, memory[2:])
    recorded = next(iter(runner._table.plans.values())).recorded
    expected = memory.clone()
    expected += 1
    expected[2:] *= expected.sum()
    rehearsal = Segment(recorded, [0, 1]).rehearse(2**20)
    whole, part = (outcome.expected for outcome in rehearsal if "wrote" in outcome.what)
    assert part.data_ptr() == whole.data_ptr() + 8
    rehearsal.take_effect()
    assert torch.equal(memory, expected)


def test_memory_that_ends_with_a_segment_is_not_looked_at():
    region = Region()
    x = region.tensor("x")
    a = region.step(lambda x: x + 1, x)
    live = region.step(lambda a: a.sum(), a, capture=LIVE)
    program = region.returning(region.step(lambda a, s: a.add_(s) * 2, a, live, mutates=[a]))
    runner = runner_of(program)
    warm(runner, randn(3))
    recorded = next(iter(runner._table.plans.values())).recorded
    assert [outcome.what for outcome in Segment(recorded, [2]).rehearse(2**20)] == ["result 0"]
