"""A step at several sizes, when calls are compared, and memory that is put back."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from graphcap.compiler.breakable.calls import Outcome
from graphcap.compiler.breakable.due import CHECK_EVERY, CHECKED_REPLAYS, Due, When
from graphcap.compiler.breakable.generators import generator_states
from graphcap.compiler.breakable.incoming import Incoming, InProgress
from graphcap.compiler.breakable.key import arguments_of
from graphcap.compiler.breakable.sized import LiveStep, NotRecorded, SizedStep
from graphcap.compiler.breakable.sizes import CallSizes
from graphcap.compiler.breakable.undo import Memory
from graphcap.cudagraph import PlanStats


def test_a_step_runs_what_was_recorded_at_the_size_of_the_call() -> None:
    step = SizedStep(2)
    step.functions[3, 4] = lambda x: [x * 2]
    step.functions[8, 4] = lambda x: [x * 3]
    assert [step(n, 4, torch.ones(()))[0].item() for n in (3, 8)] == [2, 3]
    with pytest.raises(NotRecorded) as missing:
        step(5, 4, torch.ones(()))
    assert missing.value.at == (5, 4)


def live_step(ran: list[int]) -> LiveStep:
    def run(x: Tensor, total: Tensor) -> list[Tensor]:
        ran.append(len(x))
        total.add_(1)
        return [x * 2]

    step = LiveStep(1)
    for n in (3, 4):
        layout = (torch.Size([n, 2]), (2, 1), torch.float32, torch.device("cpu"))
        step.add((n,), run, (0, 1), [layout])
    return step


def test_a_live_step_repeats_what_it_did_at_another_size() -> None:
    ran: list[int] = []
    step, total = live_step(ran), torch.zeros(2)
    did = Outcome([torch.full((3, 2), 7.0)], {1: torch.full((2,), 5.0)}, generator_states())
    step.repeat(did)
    (made,) = step(4, torch.ones(4, 2), total)
    assert torch.equal(made[:3], torch.full((3, 2), 7.0))
    assert made.shape == (4, 2)
    assert torch.equal(total, torch.full((2,), 5.0))
    assert not ran
    (made,) = step(4, torch.ones(4, 2), total)  # once only
    assert torch.equal(made, torch.full((4, 2), 2.0))
    assert ran == [4]


def test_what_a_thread_repeats_is_its_own() -> None:
    ran: list[int] = []
    step = live_step(ran)
    step.repeat(Outcome([torch.zeros(3, 2)], {}, generator_states()))
    other = threading.Thread(target=lambda: step(3, torch.ones(3, 2), torch.zeros(2)))
    other.start()
    other.join()
    assert ran == [3]
    step(3, torch.ones(3, 2), torch.zeros(2))
    assert ran == [3]


def test_the_function_itself_serves_a_call_with_its_own_tensors_alone() -> None:
    """A proof gives copies of what a call writes, which may be none of its arguments."""
    x, cache = torch.ones(3), torch.zeros(3)
    ran: list[str] = []

    def function(x: Tensor) -> Tensor:
        ran.append("function")
        return x * 2

    def stitched(*inputs: object) -> tuple[object, ...]:
        ran.append("steps")
        return inputs

    arguments = arguments_of((x,), {}, {}, CallSizes({"n": 3}, {}))
    progress = InProgress()
    progress.call = Incoming(function, (x,), {}, arguments, frozenset(), lambda: ["x"])
    progress.inputs = [x, 3, cache]
    progress.run(stitched, (x, 3, cache.clone()))
    progress.run(stitched, (x.clone(), 3, cache))
    progress.run(stitched, (x, 4, cache))
    assert ran == ["steps"] * 3
    (served,) = progress.run(stitched, (x, 3, cache))
    assert ran[3:] == ["function"]
    assert served is progress.call.result


def plan(*key: int) -> PlanStats:
    return PlanStats(key, "FULL", 1, [], {}, 0, 0.0)


def test_the_first_replays_of_a_plan_are_compared_and_one_at_each_other_size() -> None:
    due, small, large = Due(), plan(4), plan(8)

    def compared(n: int, outlook: PlanStats | str, calls: int = 5) -> int:
        return [due.when(n, outlook, (n,), True) for _ in range(calls)].count(When.FIRST)

    assert compared(4, small) == CHECKED_REPLAYS
    assert compared(3, small) == 1
    assert compared(5, large) == 1
    assert compared(3, small) == 0
    assert compared(3, plan(4)) == 1  # captured again
    assert compared(9, "above the ladder") == 0


def test_a_padded_call_is_compared_before_there_is_a_plan() -> None:
    due = Due()
    assert due.when(3, "", (3,), True) is When.FIRST
    due.was_checked(3, ran_live=True)  # it was the one that proved padding
    assert due.when(3, "", (3,), True) is When.FIRST
    due.was_checked(3, ran_live=False)
    assert due.when(3, "", (3,), True) is When.NEVER
    assert due.when(3, plan(4), (3,), True) is When.FIRST
    assert Due().when((), "", (), False) is When.NEVER


def test_every_256th_call_is_compared_again() -> None:
    due, served = Due(), plan()
    found = [due.when((), served, (), False) for _ in range(2 * CHECK_EVERY)]
    assert [at + 1 for at, when in enumerate(found) if when is When.AGAIN] == [CHECK_EVERY, 2 * CHECK_EVERY]
    assert due.was_checked((), ran_live=False) == 2 * CHECK_EVERY - CHECKED_REPLAYS
    assert due.num_unchecked == 0


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(1, 4)), max_size=6))
def test_memory_is_put_back_with_the_generators(writes: list[tuple[int, int, int]]) -> None:
    storage = torch.arange(24.0).view(4, 6)
    tensors = [storage[:2], storage.t()[1:3], torch.arange(6)]
    before, memory = [each.clone() for each in (storage, tensors[2])], Memory(tensors)
    assert memory.nbytes == 24 * 4 + 6 * 8
    torch.manual_seed(3)
    copy = memory.copy()
    for number, at, value in writes:
        tensors[number][at % len(tensors[number])] = value
    drawn = torch.rand(2)
    after = memory.copy()
    assert torch.equal(memory.within(after, tensors[1]), tensors[1])
    memory.restore(copy)
    assert torch.equal(storage, before[0])
    assert torch.equal(tensors[2], before[1])
    assert torch.equal(torch.rand(2), drawn)
