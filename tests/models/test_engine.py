"""The example's engine: what a request gets does not depend on who else is served, nor on what runs the model."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import graphcap
from bench import engine as bench
from bench.engine_runners import LIMITS, Setup, graphcapped
from examples.engine import BLOCK, Decoder, Engine, Sizes, attend, generate

SIZES = Sizes(hidden=32, layers=2, heads=2, kv_heads=1, head_dim=16, mlp=32, vocab=64, max_len=64)
REQUESTS = st.lists(
    st.tuples(st.lists(st.integers(0, SIZES.vocab - 1), min_size=1, max_size=40), st.integers(1, 8)), max_size=7
)


@functools.cache
def decoder() -> Decoder:
    torch.manual_seed(0)
    model = Decoder(SIZES, num_blocks=12).eval().requires_grad_(False)
    for layer in model.layers:
        layer.out.weight.mul_(20)  # so that attention decides what comes next
    return model


@settings(max_examples=15, deadline=None)
@given(requests=REQUESTS, max_num_reqs=st.integers(1, 5), max_num_tokens=st.integers(5, 24))
@example(requests=[([1, 2, 3, 4, 5], 2), ([6, 7], 9)], max_num_reqs=2, max_num_tokens=6)  # a chunk of one token
def test_a_request_is_served_as_if_alone(
    requests: list[tuple[list[int], int]], max_num_reqs: int, max_num_tokens: int
) -> None:
    with torch.inference_mode():
        engine = Engine(decoder(), max_num_reqs, max_num_tokens)
        together = generate(engine, requests)
        alone = [generate(Engine(decoder(), 1, SIZES.max_len), [request])[0] for request in requests]
    assert together == alone
    assert sorted(engine.free_blocks) == list(range(12)), "every block has come back"
    assert not engine.running
    assert not engine.waiting


def test_attention_over_blocks_is_causal_attention() -> None:
    length, table = 2 * BLOCK + 5, torch.tensor([3, 0, 2])
    generator = torch.Generator().manual_seed(0)
    q, keys, values = (torch.randn(length, heads, 8, generator=generator) for heads in (4, 2, 2))
    cache = torch.full((2, 4 * BLOCK + 1, 2, 8), 1e4)  # what is not this request's would be seen
    slots = (table[:, None] * BLOCK + torch.arange(BLOCK)).flatten()[:length]
    cache[0, slots], cache[1, slots] = keys, values
    positions = torch.arange(length)
    dense = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1), *(each.repeat_interleave(2, 1).transpose(0, 1) for each in (keys, values)), is_causal=True
    ).transpose(0, 1)
    last = attend(q[None, 20:], cache, table[None], positions[None, 20:])[0]
    single = attend(q[:, None], cache, table.expand(length, -1), positions[:, None])[:, 0]
    assert torch.allclose(last, dense[20:], atol=1e-5)
    assert torch.allclose(single, dense, atol=1e-5)


def test_nobody_writes_into_the_row_that_belongs_to_nobody() -> None:
    with torch.inference_mode():
        generate(Engine(decoder()), [([1, 2, 3], 4)])
        zeros = torch.zeros(5, dtype=torch.int64)
        with graphcap.step(num_tokens=5, num_reqs=5, uniform_query_len=1, inputs={"block_tables": zeros.view(5, 1)}):
            before = [layer.cache.clone() for layer in decoder().layers]
            decoder()(zeros, zeros, zeros - 1)
    for layer, cache in zip(decoder().layers, before, strict=True):
        assert torch.equal(layer.cache, cache)
        assert not layer.cache[:, -1].any()


@pytest.mark.parametrize(("prompt", "new"), [([], 4), ([1], 0), ([1] * 60, 5)])
def test_a_request_that_cannot_be_served_is_refused(prompt: list[int], new: int) -> None:
    with pytest.raises(ValueError, match=rf"{len(prompt)} tokens and {new} new ones: expected .* {4 * BLOCK} in all"):
        Engine(decoder()).add(prompt, new)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"outputs": "static", "guards": "sealed"}, {"cudagraph_mode": "PIECEWISE"}])
def test_rows_on_a_gpu_are_those_of_fp32(options: dict[str, str]) -> None:
    torch.manual_seed(0)
    limits = LIMITS["tiny"]
    with torch.device("cuda"):
        wide = Decoder(limits.sizes, limits.num_blocks).eval().requires_grad_(False)
        model = Decoder(limits.sizes, limits.num_blocks).eval().requires_grad_(False)
    model.load_state_dict(wide.state_dict())
    setup, traffic = Setup(model.bfloat16(), limits), bench.mixed_traffic(limits, 9)
    with torch.inference_mode():
        reference = bench.forced_rows(setup.engine(model=wide), traffic)
        runner = graphcapped(**options)(setup)
        with graphcap.allow_capture(False):
            rows = bench.forced_rows(setup.engine(runner), traffic)
    found = bench.errors(rows, reference)
    assert found["wrong_rows"] == 0
    assert found["relative_error"] < 0.1
