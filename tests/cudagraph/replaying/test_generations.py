"""Reading an output after its memory was written again raises, where that is checked."""

from __future__ import annotations

import gc
import pickle

import numpy as np
import pytest
import torch

from graphcap.cudagraph.replaying.generations import Generations
from graphcap.errors import ConfigError, StaleOutputError
from tests.cudagraph.regions import LIVE, Region, randn, runner_of, warm


def two_outputs():
    region = Region()
    x = region.tensor("x")
    base = region.step(lambda x: x * 2, x)
    tail = region.step(lambda b: b[1:], base)
    fresh = region.step(lambda b: b + 1, base, capture=LIVE)
    return region.returning(base, tail, fresh, x)


@pytest.fixture
def checked(monkeypatch):
    monkeypatch.setenv("GRAPHCAP_CHECK_OUTPUTS", "1")


USES = {
    "add": lambda t: t + 1,
    "read by another": lambda t: torch.ones(4).add_(t),
    "in a list": lambda t: torch.cat([torch.ones(4), t]),
    "shape": lambda t: t.shape,
    "address": lambda t: t.data_ptr(),
    "item": lambda t: t[0].item(),
    "index": lambda t: t[1:],
    "list": lambda t: t.tolist(),
    "numpy": lambda t: t.numpy(),
    "asarray": np.asarray,
    "repr": repr,
    "clone": lambda t: t.clone(),
    "write": lambda t: t.zero_(),
    "write an item": lambda t: t.__setitem__(0, 1.0),
    "pickle": pickle.dumps,
    "len": len,
    "module": torch.nn.Linear(4, 4),
}


@pytest.mark.parametrize("use", USES)
def test_any_use_of_a_stale_output_raises(checked, use):
    """Field notes row 25: an output that was overwritten is read in silence."""
    runner = runner_of(two_outputs(), outputs="static")
    warm(runner, randn(4))
    out, *_ = runner(randn(4))
    if use not in ("pickle", "write", "write an item"):
        USES[use](out)
    runner(randn(4))
    with pytest.raises(StaleOutputError, match="outputs='static' keeps it for 1 replay"):
        USES[use](out)


@pytest.mark.parametrize(("outputs", "lifetime"), [("static", 1), ("ring:1", 1), ("ring:2", 2), ("ring:3", 3)])
def test_outputs_are_good_for_as_long_as_the_policy_says_and_not_longer(checked, outputs, lifetime):
    runner = runner_of(two_outputs(), outputs=outputs)
    given, kept = [], []
    for _ in range(3 + 3 * lifetime):
        given.append(randn(4))
        kept.append(runner(given[-1]))
        in_memory = list(zip(given, kept, strict=True))[2:]  # the first two calls are live
        for x, (base, tail, *_) in in_memory[-lifetime:]:
            assert torch.equal(base, x * 2)
            assert torch.equal(tail, x[1:] * 2)
        for _, (base, tail, *_) in in_memory[:-lifetime]:
            for each in (base, tail):
                with pytest.raises(StaleOutputError, match=f"outputs='{outputs}' keeps it for {lifetime} replay"):
                    each.sum()
    for x, (*_, fresh, argument) in zip(given, kept, strict=True):
        assert argument is x
        assert torch.equal(fresh, x * 2 + 1), "what a live step made is not in static memory"
    for x, (base, *_) in list(zip(given, kept, strict=True))[:2]:
        assert torch.equal(base, x * 2), "live calls return fresh tensors"


def test_an_output_that_is_still_good_is_a_plain_tensor(checked):
    runner = runner_of(two_outputs(), outputs="static")
    warm(runner, randn(4))
    assert {type(each) for each in runner(randn(4))} == {torch.Tensor}


def test_clones_never_go_stale(checked):
    runner = runner_of(two_outputs(), outputs="clone")
    kept = [(x, runner(x)[0]) for x in (randn(4) for _ in range(8))]
    assert all(torch.equal(out, x * 2) for x, out in kept)
    assert runner.stats.replays == 5


def test_the_plan_of_another_size_does_not_end_an_output(checked):
    region = Region()
    region.size("n")
    x = region.tensor("x")
    runner = runner_of(region.returning(region.step(lambda x: x * 2, x)), outputs="static")
    for n in (2, 3):
        for _ in range(3):
            runner(n, randn(n))
    (of_two,), (of_three,) = runner(2, x := randn(2)), runner(3, randn(3))
    runner(3, randn(3))
    assert torch.equal(of_two, x * 2)
    with pytest.raises(StaleOutputError):
        of_three.sum()


def test_a_call_that_runs_live_does_not_end_an_output(checked):
    runner = runner_of(two_outputs(), outputs="static")
    warm(runner, randn(4))
    out, *_ = runner(x := randn(4))
    runner(randn(8)[::2])
    assert runner.stats.live_calls["an input has another layout or shares other memory than at capture"] == 1
    assert torch.equal(out, x * 2)


def test_a_replay_that_fails_ends_the_outputs_that_it_may_have_overwritten(checked):
    region = Region()
    x, fail = region.tensor("x"), region.size("fail", in_key=False)
    y = region.step(lambda x: x * 2, x)
    region.step(lambda y, fail: 1 // (1 - fail), y, fail, capture=LIVE)
    runner = runner_of(region.returning(y), outputs="static")
    warm(runner, randn(4), 0)
    (out,) = runner(randn(4), 0)
    with pytest.raises(ZeroDivisionError):
        runner(randn(4), 1)
    with pytest.raises(StaleOutputError):
        out.sum()
    (out,) = runner(x := randn(4), 0)
    assert torch.equal(out, x * 2)


def test_a_debug_folder_asks_for_the_check(tmp_path):
    for settings in ({}, {"debug_dir": str(tmp_path)}):
        runner = runner_of(two_outputs(), outputs="static", **settings)
        warm(runner, randn(4))
        out, *_ = runner(randn(4))
        runner(randn(4))
        if settings:
            with pytest.raises(StaleOutputError):
                out.sum()
        else:
            out.sum()


def test_without_the_check_a_replay_does_nothing_for_it():
    runner = runner_of(two_outputs(), outputs="static")
    warm(runner, randn(4))
    (plan,) = runner.stats.plans
    assert "expire" not in plan.source
    assert "handed_out" not in plan.source


def test_a_variable_that_is_neither_yes_nor_no_is_refused(monkeypatch):
    monkeypatch.setenv("GRAPHCAP_CHECK_OUTPUTS", "perhaps")
    with pytest.raises(ConfigError, match="GRAPHCAP_CHECK_OUTPUTS"):
        runner_of(two_outputs())


def test_outputs_are_not_kept_alive():
    generations = Generations(2, "too late")
    out = torch.ones(3)
    watched = torch.ones(3)
    generations.hand_out([out, watched])
    del out
    gc.collect()
    assert sum(reference() is not None for reference in generations._held[0]) == 1
    generations.expire()
    watched.sum()
    generations.hand_out([])
    generations.expire()
    with pytest.raises(StaleOutputError, match="too late"):
        watched.sum()
