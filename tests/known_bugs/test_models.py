"""What serving engines do with a model, each in one test: calls beside eager, with the graphs that they get."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcap
from graphcap.compiler.eager_functions import eager
from tests.known_bugs.models import SETTINGS, WIDTH, Beside, Mlp, assert_same, rows

VOCAB = 32


@pytest.fixture(autouse=True)
def _same_weights() -> None:
    torch.manual_seed(0)


class Multimodal(nn.Module):
    """Takes ids or embeddings and positions [3, num_tokens]; returns two of its hidden states besides the last."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(VOCAB, WIDTH), nn.ModuleList(Mlp() for _ in range(3))

    def forward(
        self, input_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        hidden = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        hidden = hidden + positions.sum(0)[:, None] * 0.01
        auxiliary = []
        for layer in self.layers:
            auxiliary.append(hidden)
            hidden = layer(hidden)
        return hidden, auxiliary[1:]


@pytest.mark.parametrize("outputs", ["clone", "static", "ring:2"])
def test_hidden_states_mrope_positions_and_embeddings(outputs: str) -> None:
    dims = {"input_ids": 0, "positions": 1, "inputs_embeds": 0}
    both, choose = Beside(Multimodal(), dims, capture_sizes=[4, 8], outputs=outputs), random.Random(0)
    for _ in range(40):
        n = choose.randint(2, 8)
        positions = torch.arange(3 * n).view(3, n)
        if choose.random() < 0.5:
            both(torch.randint(0, VOCAB, (n,)), positions)
        else:
            both(None, positions, inputs_embeds=rows(n))
    assert len(both.plans) == 4, "two rungs for each kind of input"
    assert both.replays >= 25


class Draft(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


def test_a_draft_loop_with_sampling_is_one_graph() -> None:
    """Three steps of a draft model, each sampling what the next one reads: new numbers in each replay, the same ones
    after the same seed."""
    model = Draft()

    def draft(ids: Tensor) -> Tensor:
        tokens = []
        for _ in range(3):
            probabilities = torch.softmax(model(ids), -1)
            ids = (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1)
            tokens.append(ids)
        return torch.stack(tokens, 1)

    fast, ids = graphcap.compile(draft, dynamic_arg_dims={"ids": 0}, capture_sizes=[4], **SETTINGS), torch.arange(4)
    with torch.no_grad():
        torch.manual_seed(5)
        expected = [draft(ids) for _ in range(6)]
        for _ in range(2):  # a warm-up, the capture and replays; then replays alone
            torch.manual_seed(5)
            assert_same([fast(ids) for _ in range(6)], expected)
    assert not torch.equal(expected[0], expected[1])
    (plan,) = graphcap.explain(fast).regions[0].plans
    assert (plan.mode, plan.num_segments) == ("FULL", 1)
    assert plan.replays >= 6


@eager
def doubled(x: Tensor) -> Tensor:
    if switches.get("fail"):
        raise ConnectionError("the cache server is gone")
    return x * 2


switches: dict[str, bool] = {}


class Remembers(nn.Module):
    """Counts its calls and keeps the last row of each, around a live function."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.mlp(doubled(self.mlp(x))) + self.calls


@pytest.fixture
def fails() -> Iterator[dict[str, bool]]:
    yield switches
    switches.clear()


def test_an_error_in_a_live_function_of_a_padded_call(fails: dict[str, bool]) -> None:
    """The error is the caller's, what ran before it has run once, and the next call is right."""
    model = Remembers()
    both, choose = Beside(model, {"x": 0}, capture_sizes=[4, 8]), random.Random(0)
    for _ in range(40):
        x = rows(choose.randint(2, 8))
        fails["fail"] = choose.random() < 0.3
        if fails["fail"]:
            for each in (both.fast, both.original):
                with torch.no_grad(), pytest.raises(ConnectionError):
                    each(x)
        else:
            both(x)
        assert torch.equal(model.calls, both.original.calls)
    assert {plan.key for plan in both.plans} == {(4,), (8,)}


@pytest.mark.parametrize("outputs", ["clone", "static", "ring:3"])
def test_outputs_are_fed_back_at_changing_sizes(outputs: str) -> None:
    both, choose = Beside(Mlp(), {"x": 0}, capture_sizes=[4, 8], outputs=outputs), random.Random(0)
    for _ in range(8):
        mine = theirs = rows(choose.randint(3, 8))
        with torch.no_grad():
            for _ in range(5):
                mine, theirs, n = both.fast(mine), both.original(theirs), choose.randint(len(mine) // 2, len(mine))
                torch.testing.assert_close(mine, theirs)
                mine, theirs = mine[:n], theirs[:n]
    assert both.replays >= 20


inner_model = Mlp()
inner_original = inner_model.forward


@eager
def asks_inner(x: Tensor) -> Tensor:
    with graphcap.step(num_tokens=x.shape[0], tags={"who": "inner"}):
        assert graphcap.current_step().key.tags == (("who", "inner"),)
        return inner_model(x)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(asks_inner(self.mlp(x)))


def test_a_compiled_model_inside_of_a_live_function_with_a_step_of_its_own() -> None:
    """It is not compiled for the fake tensors of the outer trace, and the outer step holds again after it."""
    graphcap.compile(inner_model, dynamic_arg_dims={"x": 0}, capture_sizes=[4, 8], **SETTINGS)
    outer = graphcap.compile(Outer(), dynamic_arg_dims={"x": 0}, capture_sizes=[4, 8], **SETTINGS)
    with torch.no_grad():
        for n in (3, 4, 5, 3, 7, 4, 3, 8):
            x = rows(n)
            with graphcap.step(num_tokens=n, tags={"who": "outer"}):
                got = outer(x)
                assert graphcap.current_step().key.tags == (("who", "outer"),)
            hidden = Mlp.forward(outer.mlp, x)
            torch.testing.assert_close(got, Mlp.forward(outer.mlp, Mlp.forward(inner_model, hidden)))
    (region,) = graphcap.explain(outer).regions
    assert {plan.mode for plan in region.plans} == {"PIECEWISE"}
    assert len(graphcap.explain(inner_model).regions) == 1, "compiled once, for true tensors"


def test_steps_of_threads_do_not_mix() -> None:
    both = Beside(Mlp(), {"x": 0}, capture_sizes=[4, 8], specialize_tags=["lora"])
    for lora in range(2):
        for n in (4, 8, 3, 5, 4, 8) * 2:
            with graphcap.step(num_tokens=n, tags={"lora": lora}):
                both(rows(n))
    wrong: list[Any] = []

    def serve(seed: int) -> None:
        choose = random.Random(seed)
        with torch.no_grad():
            for _ in range(50):
                n, lora = choose.randint(2, 8), choose.randint(0, 1)
                x = torch.full((n, WIDTH), float(seed))
                with graphcap.step(num_tokens=n, tags={"lora": lora}):
                    got = both.fast(x)
                    said = graphcap.current_step().key
                if said.tags != (("lora", lora),) or not torch.allclose(got, both.original(x), atol=1e-5):
                    wrong.append((seed, n, lora))

    threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(both.plans) == 4
    assert both.replays >= 150


def test_no_tensor_of_a_padded_call_is_kept() -> None:
    """Arguments, results and everything in between die with the caller's references, without the collector."""
    both = Beside(Mlp(), {"x": 0}, capture_sizes=[4, 8])
    for n in (3, 3, 3, 3, 5, 5, 5):
        both(rows(n))
    gc.collect()
    gc.disable()
    try:
        for n in (3, 2, 6, 4, 8):
            x = rows(n)
            with torch.no_grad():
                out = both.fast(x)
            alive = [weakref.ref(x), weakref.ref(out)]
            del x, out
            assert [each() for each in alive] == [None, None], n
    finally:
        gc.enable()


def test_two_named_sizes_in_nested_inputs() -> None:
    def forward(batch: dict[str, Any], *, shift: Tensor | None = None) -> dict[str, Tensor]:
        x, (picks, _) = batch["x"] * 2, batch["more"]
        return {"x": x if shift is None else x + shift, "picked": x[picks], "picks": picks + 1}

    dims = {"batch.x": {0: "num_tokens"}, "batch.more": {0: "num_reqs"}, "shift": {0: "num_tokens"}}
    both = Beside(forward, dims, capture_sizes={"num_tokens": [4, 8], "num_reqs": [2, 4]})
    choose = random.Random(0)
    for _ in range(60):
        n, reqs = choose.randint(2, 8), choose.randint(1, 4)
        batch = {"x": rows(n), "more": [torch.randint(0, n, (reqs,)), torch.zeros(reqs)]}
        both(batch, **({"shift": rows(n)} if choose.random() < 0.5 else {}))
    assert {plan.key for plan in both.plans} <= {(a, b) for a in (4, 8) for b in (2, 4)}
    assert both.replays >= 30


@pytest.mark.parametrize("sealed", [False, True])
def test_empty_and_single_batches(sealed: bool) -> None:
    both = Beside(Mlp(), {"x": 0}, capture_sizes=[1, 2, 4])
    if sealed:
        with torch.no_grad():
            graphcap.capture(both.fast, lambda key: ((rows(key.num_tokens),), {}))
    with graphcap.allow_capture(not sealed):
        for n in (1, 0, 1, 0, 2, 1, 0, 1, 4, 0, 3, 1):
            assert both(rows(n)).shape == (n, WIDTH)
    assert (1,) in {plan.key for plan in both.plans}


def test_a_size_that_nobody_declared_stays_exact_beside_one_that_is_padded() -> None:
    """Here it is the stride of an argument, which is in the key."""
    both = Beside(Mlp(), {"x": 0}, capture_sizes=[4, 8])
    for n in (3, 5, 3, 5, 3, 2, 6, 7, 4, 8, 3, 5):
        both(torch.randn(n, 2 * WIDTH)[:, ::2])
    assert {plan.key for plan in both.plans} == {(4, 2), (8, 2)}
    assert both.replays >= 4
