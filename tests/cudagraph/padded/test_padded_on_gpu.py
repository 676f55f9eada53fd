"""Padded plans of real CUDA graphs: any order of sizes is what the live program is."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from graphcap.cudagraph import Capture, Program, Size, device_for
from graphcap.cudagraph.hardware.generators import same_random_numbers
from graphcap.cudagraph.padded.digest import digests
from graphcap.cudagraph.padded.proof import prove
from graphcap.cudagraph.recording.observe import observe
from tests.cudagraph.padded_regions import LIVE, N, PaddedCalls, PaddedRegion, cloned, padding_of, proof_of

WIDTH = 64

pytestmark = pytest.mark.gpu


def decoder_like(weight: Tensor, live: Capture) -> Program:
    """A norm, a product, attention over a cache that skips slots of -1, cumulative lengths."""
    region = PaddedRegion()
    x, slots = region.rows("x", WIDTH), region.rows("slots", index=True)
    starts, cache = region.rows("starts", size=Size("n", 1, 1)), region.state("cache", 32, WIDTH)

    def attend(cache: Tensor, slots: Tensor, x: Tensor) -> Tensor:
        place = slots.clamp(min=0)
        cache.index_put_((place,), torch.where((slots >= 0)[:, None], x, cache[place]))
        return x + cache[place]

    hidden = region.step(lambda x: torch.rms_norm(x, (WIDTH,)) @ weight, x)
    attended = region.step(attend, cache, slots, hidden, mutates=[cache], capture=live)
    out = region.step(lambda a, starts: a * starts.diff()[:, None], attended, starts)
    return region.program(out, attended, sizes=[(N, WIDTH), (N, WIDTH)])


def call_of(n: int, cache: Tensor) -> list[object]:
    slots = torch.randperm(31, device="cuda")[:n] + 1
    return [n, torch.randn(n, WIDTH, device="cuda"), slots, torch.arange(n + 1, device="cuda") * 2, cache]


@pytest.mark.parametrize("live", [Capture.ALWAYS, LIVE])
def test_any_order_of_sizes_is_what_the_live_program_is(live: Capture) -> None:
    torch.manual_seed(0)
    device, _ = device_for({torch.device("cuda", 0)}, simulate=False)
    weight = torch.randn(WIDTH, WIDTH, device="cuda") / 8
    program, cache = decoder_like(weight, live), torch.randn(32, WIDTH, device="cuda")
    fills = {"slots": -1, "starts": "edge"}
    assert proof_of(program, call_of(5, cache), 8, pad=fills).reason == ""
    calls = PaddedCalls(program, device=device, pad=fills)
    with torch.no_grad():
        for rung in (16, 8, 4):
            calls.capture({"n": rung}, call_of(rung - 1, cache))
        sizes = [*range(1, 17)] * 3
        random.Random(0).shuffle(sizes)
        kept = []
        for n in sizes:
            args = call_of(n, cache)
            theirs = cloned(args)
            expected, got = program.run(*theirs), calls(*args)
            for mine, true in zip((*got, *args), (*expected, *theirs), strict=True):
                torch.testing.assert_close(mine, true)
            cache.copy_(theirs[-1])
            kept.append((got, cloned(got)))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for got, copies in kept for a, b in zip(got, copies, strict=True))
    assert not calls.mismatches


def test_a_step_that_mixes_rows_is_refused_on_the_gpu() -> None:
    region = PaddedRegion()
    x = region.rows("x", WIDTH)
    product = region.step(lambda x: x * 2, x)
    mixed = region.step(lambda x: x / x.abs().max(), product)
    program = region.program(mixed, sizes=[(N, WIDTH)])
    assert proof_of(program, [5, torch.randn(5, WIDTH, device="cuda").half()], 8).reason.startswith("step_1 ")


def most_of_the_memory() -> Tensor:
    """bfloat16 ``[rows, WIDTH]`` of 60 % of what is free, not empty."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    cache = torch.empty(int(free * 0.6) // (2 * WIDTH), WIDTH, dtype=torch.bfloat16, device="cuda")
    for part in cache.split(2**22):
        part.copy_(torch.rand(WIDTH, device="cuda"))
    return cache


@pytest.mark.parametrize("fill", [-1, 0])
def test_padding_is_proved_beside_a_cache_that_fills_most_of_the_memory(fill: int) -> None:
    """Whether it is allowed or not, the cache is that of the call alone, and memory is as it was."""
    kept = most_of_the_memory()
    region = PaddedRegion()
    x, slots, cache = region.rows("x", WIDTH), region.rows("slots", index=True), region.state("cache", *kept.shape)

    def attend(cache: Tensor, slots: Tensor, x: Tensor) -> Tensor:
        place = slots.clamp(min=0)
        cache.index_put_((place,), torch.where((slots >= 0)[:, None], x, cache[place]))
        return x + cache[place]

    step = region.step(attend, cache, slots, x, mutates=[cache])
    program = region.program(step, sizes=[(N, WIDTH)])
    rows = torch.linspace(1, len(kept) - 1, 6, dtype=torch.float64, device="cuda").long()
    args = [6, torch.randn(6, WIDTH, dtype=torch.bfloat16, device="cuda"), rows, kept]
    device, _ = device_for({torch.device("cuda", 0)}, simulate=False)
    with torch.no_grad():
        seen, outputs = observe(program, args, device.device)  # run twice, it leaves the same
        expected = digests(kept.view(-1).view(torch.uint8), 2**21)
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        verdict = prove(
            program, args, padding_of(program, pad={"slots": fill}), {"n": 8}, seen, device.device, device.spare_bytes()
        )
    assert bool(verdict.reason) == (fill == 0), verdict.reason
    assert not verdict.is_open
    assert torch.equal(verdict.outputs[0], outputs[0])
    assert torch.equal(digests(kept.view(-1).view(torch.uint8), 2**21), expected)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.mem_get_info()[0] >= free - 2**26


def test_generators_of_the_gpu_are_put_back() -> None:
    device = torch.device("cuda", 0)
    with same_random_numbers(device):
        drawn = torch.rand(4, device=device)
    assert torch.equal(torch.rand(4, device=device), drawn)
