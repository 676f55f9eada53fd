"""The same on real CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphcap
from tests.compiler.breakable.like_original import CALLS

pytestmark = pytest.mark.gpu

ran: list[int] = []


@graphcap.eager
def limited(x: Tensor) -> Tensor:
    ran.append(1)
    return x * 2 if x.sum().item() < 1e6 else x


class Decoder(nn.Module):
    """Attention over a cache of ``[32, 64]`` that every call writes, a live function and numbers made in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)
        self.register_buffer("keys", torch.zeros(32, 64))
        self.register_buffer("values", torch.zeros(32, 64))

    def forward(self, x: Tensor, at: Tensor, live: bool = True) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(x).chunk(3, -1)
        self.keys.index_copy_(0, at, k)
        self.values.index_copy_(0, at, v)
        shape = (1, 1, -1, 64)
        y = F.scaled_dot_product_attention(q.view(shape), self.keys.view(shape), self.values.view(shape)).view(-1, 64)
        y = limited(y) if live else y
        y = self.out(y) * torch.tensor([0.5, 2.0], device=x.device).repeat(32)
        return y, self.keys[at]


def twins(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(make().cuda().eval().requires_grad_(False))
    return models[0], graphcap.compile(models[1], frontend="breakable")


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_effects_and_report(live: bool, mode: Callable[[], Any], dtype: torch.dtype) -> None:
    original, captured = twins(lambda: Decoder().to(dtype))
    ran.clear()
    kept = []
    with mode():
        for call in range(2 * CALLS):
            x, at = torch.randn(4, 64, device="cuda", dtype=dtype), torch.randperm(32, device="cuda")[:4]
            expected = original(x, at, live)
            before = len(ran)
            got = captured(x, at, live)
            assert len(ran) - before == live, call
            kept.append((got, expected))
            torch.testing.assert_close(captured.keys, original.keys)
    for got, expected in kept:
        torch.testing.assert_close(got, expected)
    (region,) = graphcap.explain(captured).regions
    assert not region.bypass
    assert not region.failures
    assert region.replays == 2 * CALLS - 4
    assert region.device == "cuda:0"
    (plan,) = region.plans
    # With a live step there is no graph of the whole: attention, and the view of its result, is live as well.
    assert plan.num_segments == (2 if live else 1)
    assert list(plan.live) == (["piece_1", "piece_2"] if live else [])
    assert [piece.capture for piece in region.pieces] == ["always", "full", *["never"] * live, "always"]


def test_random_numbers_follow_the_seed() -> None:
    original, captured = twins(lambda: nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5)))
    original.train()
    captured.train()
    x = torch.randn(4, 64, device="cuda")
    with torch.no_grad():
        for seed in range(CALLS):
            torch.manual_seed(seed)
            expected = original(x)
            torch.manual_seed(seed)
            torch.testing.assert_close(captured(x), expected)
        assert not torch.equal(captured(x), captured(x))
    (region,) = graphcap.explain(captured).regions
    assert not region.bypass
    assert region.replays >= 4


def test_a_kernel_that_torch_does_not_know_is_refused() -> None:
    triton = pytest.importorskip("triton")
    kernel = _double_kernel(triton)

    def function(x: Tensor) -> Tensor:
        result = torch.empty_like(x)
        kernel[(1,)](x, result, x.numel(), BLOCK=256)
        return result + 1

    captured = graphcap.compile(function, frontend="breakable")
    with torch.no_grad():
        for _ in range(CALLS):
            x = torch.randn(4, 64, device="cuda")
            torch.testing.assert_close(captured(x), x * 2 + 1)
    (region,) = graphcap.explain(captured).regions
    assert "data_ptr" in region.bypass or "memory that no operator has written" in region.bypass


def _double_kernel(triton: Any) -> Any:
    tl = triton.language
    globals()["tl"] = tl

    @triton.jit
    def double(x, out, n, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        tl.store(out + at, tl.load(x + at, mask=at < n) * 2, mask=at < n)

    return double


def test_tensors_on_the_cpu_stay_live() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        return (x * 2 + y.to("cuda")) * 3

    captured = graphcap.compile(function, frontend="breakable")
    with torch.no_grad():
        for _ in range(CALLS):
            x, y = torch.randn(4, device="cuda"), torch.randn(4)
            torch.testing.assert_close(captured(x, y), function(x, y))
    (region,) = graphcap.explain(captured).regions
    assert not region.bypass
    assert [piece.capture for piece in region.pieces] == ["always", "never", "always"]
    assert "touches a tensor on cpu" in region.pieces[1].reason
    assert region.replays == CALLS - 4


class PagedDecoder(nn.Module):
    """Row-wise attention over a cache of ``[33, 64]``, whose last row belongs to nobody and stays 0."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)
        self.register_buffer("keys", torch.zeros(33, 64))
        self.register_buffer("values", torch.zeros(33, 64))

    def forward(self, x: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(x).chunk(3, -1)
        real, at = (slots >= 0)[:, None], torch.where(slots < 0, 32, slots)
        self.keys.index_copy_(0, at, torch.where(real, k, 0))
        self.values.index_copy_(0, at, torch.where(real, v, 0))
        shape = (1, 1, -1, 64)
        keys, values = self.keys[:32].view(shape), self.values[:32].view(shape)
        y = F.scaled_dot_product_attention(q.view(shape), keys, values).view(-1, 64)
        return self.out(limited(y)), y.t()


@pytest.mark.parametrize("ahead", [False, True])
def test_a_ladder_without_dynamo(ahead: bool) -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(PagedDecoder().cuda().eval().requires_grad_(False))
    original, captured = models
    graphcap.compile(
        captured,
        frontend="breakable",
        dynamic_arg_dims={"x": 0, "slots": 0},
        pad={"slots": -1},
        capture_sizes=[1, 2, 4, 8, 16, 32],
    )

    def inputs(key: graphcap.GraphKey) -> Any:
        n = key.num_tokens
        return (torch.zeros(n, 64, device="cuda"), torch.full((n,), -1, device="cuda")), {}

    with torch.inference_mode():
        if ahead:
            summary = graphcap.capture(captured, inputs)
            assert [key.num_tokens for key in summary.captured] == [32, 16, 8, 4, 2, 1], summary
            assert not captured.keys.any()
        for _ in range(4):
            for n in (3, 32, 7, 16, 1, 25, 2, 5, 12):
                x, slots = torch.randn(n, 64, device="cuda"), torch.randperm(32, device="cuda")[:n]
                torch.testing.assert_close(captured(x, slots), original(x, slots), rtol=1e-3, atol=1e-4)
                torch.testing.assert_close(captured.keys, original.keys, rtol=1e-3, atol=1e-4)
                assert not captured.keys[32].any()
    (region,) = graphcap.explain(captured).regions
    assert not region.bypass
    assert not region.failures
    assert not region.notes
    assert {plan.key for plan in region.plans} >= {(32,), (16,), (8,), (4,)}
    assert region.replays >= 12
    assert region.traffic.padded_tokens > 0
    assert graphcap.dispatch(captured, num_tokens=7).num_tokens == 8
