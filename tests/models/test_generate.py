"""``generate()`` of Hugging Face decoders says what eager says, and every call of the model goes through graphcap.

A generation of n tokens calls the model n times: the prefill gives the first token.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import graphcap
from tests.models.decoders import (
    CACHES,
    FAMILIES,
    NEW_TOKENS,
    Generation,
    all_regions,
    assert_same,
    backend,
    build_decoder,
    distinct_pieces,
    forget_regions,
    generate,
    plans,
    prompts,
    served,
)

SIMULATED = {"simulate": True, "compiler": "eager", "cache": False}


@pytest.fixture(autouse=True)
def _no_earlier_regions() -> None:
    forget_regions()


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A cache of compiled pieces that the tests of this module share."""
    return str(tmp_path_factory.mktemp("artifacts"))


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


def compare_with_eager(family: str, cache: str, enter: Any) -> None:
    """Two generations from different prompts, eager and after ``enter(model)``."""
    model = build_decoder(family)
    eager: list[Generation] = [generate(model, prompt, cache, disable_compile=True) for prompt in prompts()]
    model = build_decoder(family)
    arguments = enter(model) or {"disable_compile": True}
    for prompt, expected in zip(prompts(), eager, strict=True):
        assert_same(generate(model, prompt, cache, **arguments), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_growing_cache_is_replayed_around_live_attention(family: str) -> None:
    compare_with_eager(family, "dynamic", through_module)

    assert served().total == 2 * NEW_TOKENS, "a call of the model did not go through graphcap"
    # Prefill, first step, any later step, prefill of any length. Two layers: what precedes the first attention, what
    # lies between the two, what follows, and attention twice, which shares its code.
    assert [(len(region.pieces), distinct_pieces(region)) for region in all_regions()] == [(5, 4)] * 4

    (plan,) = plans()
    assert (plan.mode, plan.num_segments, len(plan.captured)) == ("PIECEWISE", 3, 3)
    assert len(plan.live) == 2
    assert all("grows with every call" in reason for reason in plan.live.values())
    # The second prompt is longer than the first, and its decode steps need no new plan.
    assert plan.replays >= 2 * NEW_TOKENS - 6


@pytest.mark.parametrize("family", FAMILIES)
def test_static_cache_is_one_graph(family: str) -> None:
    compare_with_eager(family, "static", through_module)

    assert served().total == 2 * NEW_TOKENS, "a call of the model did not go through graphcap"
    # Prefill and decode, for the length of the first cache and then for any length.
    assert [len(region.pieces) for region in all_regions()] == [5] * 4
    # The prefill makes the cache. Where that may have any length, each layer's length is a symbol of its own; with a
    # mask that serves both, the two attentions are not the same code.
    first_prefill, first_decode, prefill, decode = map(distinct_pieces, all_regions())
    assert (first_prefill, first_decode, decode) == (4, 4, 4)
    assert prefill in (4, 5)

    # The length of the cache is that of the prompt and the new tokens: a plan for each.
    assert [(plan.mode, plan.num_segments, plan.live) for plan in plans()] == [("FULL", 1, {})] * 2
    assert served().replayed >= 2 * NEW_TOKENS - 8


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_pieces_compiled_by_inductor_generate_eagers_tokens(family: str, cache: str, artifacts: str) -> None:
    options = {"simulate": True, "cache_dir": artifacts}
    compare_with_eager(family, cache, lambda model: model.compile(backend=backend(), options=options))

    assert served().total == 2 * NEW_TOKENS
    assert served().replayed > 0
    for region in all_regions():
        compiled = [piece for piece in region.pieces if piece.kind == "captured"]
        assert {piece.origin for piece in compiled} <= {"compiled", "cache"}, [piece.note for piece in compiled]
        assert len({piece.key for piece in compiled}) == 3


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("enter", [through_forward, through_graphcap])
def test_other_ways_in_serve_every_call(enter: Any, cache: str) -> None:
    compare_with_eager("llama", cache, enter)

    assert served().total == 2 * NEW_TOKENS
    assert served().replayed > 0


def test_compile_config_serves_every_decode_step() -> None:
    """``generate()`` uses a CompileConfig with a static cache, and not for the prefill."""
    compare_with_eager("llama", "static", through_generation_config)

    assert served().total == 2 * (NEW_TOKENS - 1)
    assert served().replayed > 0


def test_generate_of_a_torch_compile_result_runs_the_original_module() -> None:
    """Why the README says ``model.compile()``: this one never reaches graphcap, and explain() says so."""
    model = build_decoder("llama")
    compiled = torch.compile(model, backend=backend(), options=SIMULATED)
    compiled.generate(prompts()[0], do_sample=False, max_new_tokens=4)

    assert served().total == 0
    assert "no call of it has reached graphcap" in str(graphcap.explain(compiled))
