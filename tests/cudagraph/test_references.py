"""What a call brings is let go when the call ends: by plans, runner and arena, also when the call failed."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import weakref
from collections.abc import Iterator

import pytest
import torch

from tests.cudagraph.regions import LIVE, Region, randn, runner_of


class ModelError(Exception):
    """Raised by a live step."""


def every_binding(fails, fresh):
    """A copied input, a written one, one for live steps only, a size for live steps; live results on both sides."""
    region = Region()
    weight, state = region.static("weight"), region.tensor("state")
    cache, x, k = region.tensor("cache"), region.tensor("x"), region.size("k", in_key=False)
    y = region.step(lambda w, s, x: s.add_(x) * w, weight, state, x, mutates=[state])

    def attend(cache, y, k):
        result = cache.sum(0) + y * k
        fresh.append(weakref.ref(result))
        if fails:
            raise ModelError
        return result

    z = region.step(attend, cache, y, k, capture=LIVE)
    w = region.step(lambda z: z * 3, z)
    program = region.returning(w, z, state)
    steps = [dataclasses.replace(step, unproven=("ns::op",) if step.name == "step_2" else ()) for step in program.steps]
    return dataclasses.replace(program, steps=tuple(steps))


@pytest.fixture(scope="module", autouse=True)
def _torch_has_recorded_before() -> None:
    """The first dispatch mode of a process makes torch import more, with exceptions that hold frames for a while."""
    region = Region()
    x = region.tensor("x")
    runner = runner_of(region.returning(region.step(lambda x: x + 1, x)))
    for _ in range(4):
        runner(randn(2))


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Only counting references frees anything here."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def call(runner, weight, held, *, rows=2):
    """One call; returns nothing, and notes what it brought and got."""
    state, cache, x = randn(3), randn(rows, 3), randn(3)
    held += map(weakref.ref, (state, cache, x))
    with contextlib.suppress(ModelError):
        held += map(weakref.ref, runner(weight, state, cache, x, 2)[:2])


def left(held):
    return [ref() for ref in held if ref() is not None]


@pytest.mark.parametrize("settings", [{}, {"verify": True}, {"annotate": True}], ids=["plain", "verify", "annotate"])
@pytest.mark.parametrize("fails_at", [None, 0, 1, 2, 3, 4, 6])
def test_no_call_leaves_a_tensor_behind(fails_at, settings):
    fails, held = [], []
    runner = runner_of(every_binding(fails, held), **settings)
    weight = randn(3)
    with without_collector():
        for number in range(9):
            fails[:] = [1] if number == fails_at else []
            call(runner, weight, held, rows=1 + number)
            assert not left(held), f"call {number}"
    assert runner.stats.replays >= 2
    assert len(held) > 9 * 3


def test_a_capture_that_failed_leaves_no_tensor_behind():
    region = Region()
    x = region.tensor("x")
    y = region.step(lambda x: x * float(x.sum()), x)  # waits for the device: refused in a recording
    runner = runner_of(region.returning(region.step(lambda y: y + 1, y)))
    held = []
    for _ in range(6):
        x = randn(3)
        held += [weakref.ref(x), weakref.ref(runner(x)[0])]
    del x
    gc.collect()  # the exception of the refused recording
    assert runner.stats.failures
    assert not left(held)


def test_a_plan_for_a_smaller_shape_leaves_the_inputs_of_a_larger_one():
    region = Region()
    n, x = region.size("n"), region.tensor("x")
    runner = runner_of(region.returning(region.step(lambda n, x: x + n, n, x)))
    held = []
    with without_collector():
        for n in (4, 4, 4, 2, 2, 2, 4, 2):
            x = randn(n)
            held.append(weakref.ref(x))
            runner(n, x)
        del x
        assert not left(held)
    assert runner.stats.replays == 2


def test_a_moved_parameter_is_let_go():
    region = Region()
    weight, x = region.static("weight"), region.tensor("x")
    runner = runner_of(region.returning(region.step(lambda w, x: w * x, weight, x)))
    held = []
    for _ in range(2):
        weight = torch.nn.Parameter(randn(3))
        held.append(weakref.ref(weight))
        with torch.no_grad():
            for _ in range(5):
                runner(weight, randn(3))
    del weight
    gc.collect()
    assert runner.stats.recaptures == 1
    assert not left(held)
