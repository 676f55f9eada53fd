"""What is captured and what runs live, worked out without any device."""

from __future__ import annotations

import weakref

import pytest
import torch

from graphcap.cudagraph import Binding, Capture
from graphcap.cudagraph.recording.bindings import Choice
from graphcap.cudagraph.recording.layout import lay_out
from graphcap.cudagraph.recording.observe import argument_roots, observe
from tests.cudagraph.regions import LIVE, Region, randn

CPU = torch.device("cpu")


def laid_out(program, *args, full=False, **given):
    choice = {"full": full, "demoted": {}, "unstable": (), "static_args": (), "max_copy_bytes": 2**20} | given
    return lay_out(program, observe(program, args, CPU)[0], Choice(**choice))


def test_number_from_a_live_step_makes_its_reader_live_and_so_on():
    region = Region()
    x = region.tensor("x")
    n = region.step(lambda x: int(x.sum()), x, capture=LIVE)
    m = region.step(lambda n: n + 1, n)
    program = region.returning(region.step(lambda x, m: x * m, x, m), region.step(lambda x: x + 1, x))
    live = laid_out(program, torch.ones(2)).live
    assert sorted(live) == [0, 1, 2]
    assert live[2] == "result 0 of step_1 is a number that the key does not fix"


def test_number_from_a_captured_step_is_part_of_the_graph():
    region = Region()
    n, x = region.size("n"), region.tensor("x")
    m = region.step(lambda n: n * 2, n)
    program = region.returning(region.step(lambda x, m: x * m, x, m))
    assert not laid_out(program, 3, randn(2)).live


def test_tensor_on_another_device_makes_its_readers_live():
    region = Region()
    x, there = region.tensor("x"), region.tensor("there")
    y = region.step(lambda x: x + 1, x)
    program = region.returning(y, region.step(lambda t: t, there))
    layout = laid_out(program, randn(2), torch.empty(2, device="meta"))
    assert layout.live == {1: "input there is on meta, the graph is on cpu"}


def test_writing_live_step_makes_a_captured_readers_input_static():
    region = Region()
    cache, x = region.tensor("cache"), region.tensor("x")
    region.step(lambda c, x: c.add_(x), cache, x, mutates=[cache], capture=LIVE)
    program = region.returning(region.step(lambda c: c * 2, cache))
    assert laid_out(program, randn(2), randn(2)).bindings == (Binding.STATIC, Binding.REFERENCE)


def test_full_steps_are_captured_on_request_only():
    region = Region()
    x = region.tensor("x")
    program = region.returning(region.step(lambda x: x.softmax(0), x, capture=Capture.FULL))
    assert laid_out(program, randn(2)).live == {0: "for the test"}
    assert not laid_out(program, randn(2), full=True).live


@pytest.mark.parametrize(
    ("choice", "captured"),
    [
        ({"full": True}, []),
        ({"full": True, "uniform_query_len": 1}, [0, 1]),
        ({"full": True, "uniform_query_len": 4}, [0]),
        ({"full": False, "uniform_query_len": 1}, []),
    ],
    ids=["mixed", "one token", "four tokens", "piecewise"],
)
def test_steps_for_uniform_batches_are_captured_in_full_plans_of_such_batches(choice, captured):
    region = Region()
    x = region.tensor("x")
    y = region.step(lambda x: x + 1, x, capture=Capture.UNIFORM)
    program = region.returning(region.step(lambda y: y * 2, y, capture=Capture.UNIFORM_SINGLE))
    live = laid_out(program, randn(2), **choice).live
    assert [number for number in (0, 1) if number not in live] == captured


def test_a_step_apart_has_a_segment_of_its_own_and_a_live_one_has_none():
    region = Region()
    x = region.tensor("x")
    for number in range(6):
        x = region.step(lambda x: x + 1, x, capture=LIVE if number == 4 else Capture.ALWAYS)
    program = region.returning(x)
    together = laid_out(program, randn(2))
    assert together.segments == (0, 0, 0, 0, -5, 1)
    layout = laid_out(program, randn(2), apart=[2, 4])
    assert layout.apart == {2}
    assert layout.segments == (0, 0, 1, 2, -5, 3)
    assert layout.releases == together.releases


def test_warm_up_frees_what_it_no_longer_needs():
    region = Region()
    x = region.tensor("x")
    alive = []

    def fresh(a):
        result = a + 1
        alive.append(weakref.ref(result))
        return result

    a = region.step(fresh, x)
    b = region.step(fresh, a)
    program = region.returning(region.step(lambda b: (alive[0]() is None) and b * 2, b))
    _, (result,) = observe(program, [randn(2)], CPU)
    assert torch.is_tensor(result)
    assert alive[1]() is None


def test_arguments_with_overlapping_storages_are_found():
    whole = torch.zeros(8)
    assert argument_roots([whole[:2], randn(2), 7, whole[6:], torch.empty(0)]) == [0, 1, -1, 0, 4]
