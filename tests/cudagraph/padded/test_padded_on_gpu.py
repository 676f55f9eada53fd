"""Padded plans of real CUDA graphs: any order of sizes is what the live program is."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from graphcap.cudagraph import Capture, Program, Size, device_for
from tests.cudagraph.padded_regions import LIVE, N, PaddedCalls, PaddedRegion, cloned, proof_of

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
