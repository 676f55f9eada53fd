"""``generate()`` of Hugging Face decoders says what eager says, and every call of the model goes through graphcap.

A generation of n tokens calls the model n times: the prefill gives the first token.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import graphcap
from graphcap.compiler.region import forget_regions
from tests.models.decoders import (
    CACHES,
    FAMILIES,
    NEW_TOKENS,
    Generation,
    assert_same,
    backend,
    build_decoder,
    distinct_pieces,
    generate,
    plans,
    prompts,
    regions_of,
    served,
)

SIMULATED = {"simulate": True, "compiler": "eager", "cache": False}


def through_module(model: Any) -> dict[str, Any]:
    model.compile(backend=backend(), options=SIMULATED)
    return {}


def through_forward(model: Any) -> dict[str, Any]:
    model.forward = torch.compile(model.forward, backend=backend(), options=SIMULATED)
    return {}


def through_graphcap(model: Any) -> dict[str, Any]:
    assert graphcap.compile(model, **SIMULATED) is model
    return {}


def through_generation_config(model: Any) -> dict[str, Any]:
    config = transformers.CompileConfig(backend=backend(), mode=None, options=SIMULATED)
    config._compile_all_devices = True  # on the CPU generate() compiles nothing by itself
    return {"compile_config": config}


def compare_with_eager(family: str, cache: str, enter: Any, lengths: tuple[int, int] = (9, 14)) -> Any:
    """Two generations from different prompts, eager and after ``enter(model)``; returns the model."""
    given = prompts(*lengths)
    model = build_decoder(family)
    eager: list[Generation] = [generate(model, prompt, cache, disable_compile=True) for prompt in given]
    model = build_decoder(family)
    arguments = enter(model) or {"disable_compile": True}
    for prompt, expected in zip(given, eager, strict=True):
        assert_same(generate(model, prompt, cache, **arguments), expected)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_growing_cache_is_replayed_around_live_attention(family: str) -> None:
    model = compare_with_eager(family, "dynamic", through_module)

    assert served(model).total == 2 * NEW_TOKENS, "a call of the model did not go through graphcap"
    first_prefill, first_step, decode, prefill = regions_of(model)
    # Two layers: what precedes the first attention, what lies between the two, what follows, and attention twice, which
    # shares its code.
    for region in (first_prefill, first_step, prefill):
        assert (len(region.pieces), distinct_pieces(region)) == (5, 4), region.name

    (plan,) = plans(model)
    assert plan.mode == "PIECEWISE"
    assert len(plan.live) >= 2
    for reason in plan.live.values():
        assert "grows with every call" in reason
    takes_mask = any("attention_mask" in reason for reason in decode.live_sizes.values())
    if not takes_mask and not any("masking_utils" in piece.source for piece in decode.pieces):
        # A mask as long as the cache, which some releases of transformers and torch have, is a few live pieces more.
        assert (len(decode.pieces), distinct_pieces(decode)) == (5, 4)
        assert (plan.num_segments, len(plan.captured), len(plan.live)) == (3, 3, 2)
    # The second prompt is longer than the first, and its decode steps need no new plan.
    assert plan.replays >= 2 * NEW_TOKENS - 6


@pytest.mark.parametrize("family", FAMILIES)
def test_static_cache_is_one_graph(family: str) -> None:
    model = compare_with_eager(family, "static", through_module)

    assert served(model).total == 2 * NEW_TOKENS, "a call of the model did not go through graphcap"
    # Prefill and decode, for the length of the first cache and then for any length.
    assert [len(region.pieces) for region in regions_of(model)] == [5] * 4
    # The prefill makes the cache. Where that may have any length, each layer's length is a symbol of its own; with a
    # mask that serves both, the two attentions are not the same code.
    first_prefill, first_decode, prefill, decode = map(distinct_pieces, regions_of(model))
    assert (first_prefill, first_decode, decode) == (4, 4, 4)
    assert prefill in (4, 5)

    # The length of the cache is that of the prompt and the new tokens: a plan for each.
    assert [(plan.mode, plan.num_segments, plan.live) for plan in plans(model)] == [("FULL", 1, {})] * 2
    assert served(model).replayed >= 2 * NEW_TOKENS - 8


@pytest.mark.parametrize("cache", CACHES)
def test_a_window_that_slides_over_the_cache_is_replayed_around_what_counts_the_tokens(cache: str) -> None:
    """Every layer counts in a Python int how many tokens it has seen: another number in every call."""
    model = compare_with_eager("mistral", cache, through_module)

    assert served(model).total == 2 * NEW_TOKENS
    assert served(model).replayed >= 2 * NEW_TOKENS - 20
    reasons = " ".join(reason for plan in plans(model) for reason in plan.live.values())
    assert "cumulative_length" in reasons
    assert "grows with every call" in reasons


@pytest.mark.slow
@pytest.mark.parametrize(("family", "cache"), [("llama", "dynamic"), ("gpt2", "static")])
def test_pieces_compiled_by_inductor_generate_eagers_tokens(family: str, cache: str) -> None:
    # Prompts of one length need no regions for a second one: a third less to compile.
    options = {"simulate": True}
    model = compare_with_eager(
        family, cache, lambda model: model.compile(backend=backend(), options=options), lengths=(9, 9)
    )

    assert served(model).total == 2 * NEW_TOKENS
    assert served(model).replayed > 0
    for region in regions_of(model):
        compiled = [piece for piece in region.pieces if piece.kind == "captured"]
        assert {piece.origin for piece in compiled} <= {"compiled", "cache"}, [piece.note for piece in compiled]
        builds_mask = any("masking_utils" in piece.source for piece in region.pieces)
        assert len({piece.key for piece in compiled}) == 3 + builds_mask


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("enter", [through_forward, through_graphcap])
def test_other_ways_in_serve_every_call(enter: Any, cache: str) -> None:
    model = compare_with_eager("llama", cache, enter)

    assert served(model).total == 2 * NEW_TOKENS
    assert served(model).replayed > 0


def test_compile_config_serves_every_decode_step() -> None:
    """``generate()`` uses a CompileConfig with a static cache, and not for the prefill."""
    model = compare_with_eager("llama", "static", through_generation_config)

    assert served(model).total == 2 * (NEW_TOKENS - 1)
    assert served(model).replayed > 0


def test_generate_of_a_torch_compile_result_runs_the_original_module() -> None:
    """Why the README says ``model.compile()``: this one never reaches graphcap, and explain() says so."""
    forget_regions()
    model = build_decoder("llama")
    compiled = torch.compile(model, backend=backend(), options=SIMULATED)
    compiled.generate(*prompts(9), do_sample=False, max_new_tokens=4)

    assert served(model).total == 0
    assert "no call of it has reached graphcap" in str(graphcap.explain(compiled))
