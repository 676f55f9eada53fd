"""A real decoder captured without Dynamo: decode steps over a static cache, and what is said where it does not work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import graphcap
from tests.models.decoders import build_decoder, prompts

STEPS = 12


def decode(model: Any, prompt: torch.Tensor, cache: Any) -> list[torch.Tensor]:
    """The logits of a prefill and of ``STEPS`` greedy steps, each [1, length, vocab]."""
    step, logits = prompt, []
    with torch.no_grad():
        for _ in range(STEPS + 1):
            logits.append(model(step, past_key_values=cache).logits)
            step = logits[-1][:, -1:].argmax(-1)
    return logits


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_static_cache_is_captured(family: str) -> None:
    original = build_decoder(family)
    captured = graphcap.compile(build_decoder(family), frontend="breakable", simulate=True)
    (prompt,) = prompts(5)
    caches = [transformers.StaticCache(config=original.config, max_cache_len=64) for _ in range(2)]
    expected, got = decode(original, prompt, caches[0]), decode(captured, prompt, caches[1])
    for mine, right in zip(got, expected, strict=True):
        assert torch.equal(mine, right)
    (region,) = [each for each in graphcap.explain(captured).regions if each.plans]
    assert region.replays == STEPS - 4
    assert [piece.capture for piece in region.pieces] == ["always", "full", "always", "full", "always"]
    assert region.pieces[1].module_path == "model.layers.0.self_attn"
    assert "past_key_values.layers.0.keys" in region.pieces[0].mutates
    assert region.bindings["past_key_values.layers.1.values"] == "static"


def test_a_growing_cache_is_left_alone() -> None:
    original = build_decoder("llama")
    captured = graphcap.compile(build_decoder("llama"), frontend="breakable", simulate=True)
    (prompt,) = prompts(5)
    caches = [transformers.DynamicCache(config=original.config) for _ in range(2)]
    expected, got = decode(original, prompt, caches[0]), decode(captured, prompt, caches[1])
    for mine, right in zip(got, expected, strict=True):
        assert torch.equal(mine, right)
    assert not any(each.plans for each in graphcap.explain(captured).regions)
    assert any("past_key_values.layers" in each.bypass for each in graphcap.explain(captured).regions)
