"""Tiny Hugging Face decoders with random weights, what ``generate()`` says with them, and who served the calls."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

import torch
import transformers
from torch import nn

from graphcap.compiler.backend import graphcap
from graphcap.compiler.region import Region, all_regions
from graphcap.cudagraph import PlanStats

NEW_TOKENS = 64
VOCAB = 256

_LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
CONFIGS: dict[str, tuple[type[transformers.PretrainedConfig], dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, _LLAMA_LIKE),
    "qwen3": (transformers.Qwen3Config, _LLAMA_LIKE),
    "gemma": (transformers.GemmaConfig, _LLAMA_LIKE),
    "gpt2": (
        transformers.GPT2Config,
        {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    ),
    "mistral": (transformers.MistralConfig, {**_LLAMA_LIKE, "sliding_window": 16}),
}
#: Those whose layers attend to all that came before. The others keep a window, and count the tokens that went by.
FAMILIES = tuple(family for family, (_, sizes) in CONFIGS.items() if "sliding_window" not in sizes)
CACHES = ("dynamic", "static")


def backend() -> Any:
    """``"graphcap"`` where the package is installed; from a bare checkout the function that the name stands for."""
    return "graphcap" if entry_points(group="torch_dynamo_backends", name="graphcap") else graphcap


def build_decoder(family: str) -> Any:
    """A causal LM in fp32.

    The weights are much larger than a fresh initialisation: with those, and embeddings tied to the head, a decoder
    repeats its last token whatever attention says, and equal tokens would prove nothing.
    """
    config_class, sizes = CONFIGS[family]
    config = config_class(**sizes, initializer_range=0.5, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def prompts(*lengths: int) -> list[torch.Tensor]:
    """Prompts of different content, each [1, length]."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, VOCAB, (1, length), generator=generator) for length in lengths]


@dataclass(frozen=True)
class Generation:
    """New tokens [batch, NEW_TOKENS] and the logits they were chosen from [NEW_TOKENS, batch, vocab]."""

    tokens: torch.Tensor
    logits: torch.Tensor


def generate(model: Any, prompt: torch.Tensor, cache: str, **arguments: Any) -> Generation:
    """Greedy ``generate()``."""
    result = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        cache_implementation=cache,
        return_dict_in_generate=True,
        output_logits=True,
        **arguments,
    )
    return Generation(result.sequences[:, prompt.shape[1] :], torch.stack(result.logits))


def assert_same(ours: Generation, eager: Generation) -> None:
    """Exactly eager's tokens, from logits that differ by rounding only."""
    assert eager.tokens.unique().numel() > 8, "a decoder that repeats itself proves nothing"
    assert torch.equal(ours.tokens, eager.tokens)
    torch.testing.assert_close(ours.logits, eager.logits, rtol=1e-3, atol=1e-3)


def regions_of(model: nn.Module) -> list[Region]:
    """The regions that Dynamo made of a model, oldest first. Their counters live as long as the model."""
    tensors = {id(parameter) for parameter in model.parameters()}
    return [region for region in all_regions() if region.shares_tensor_with(tensors)]


@dataclass(frozen=True)
class Served:
    """How the calls of a model were served."""

    live: int
    captured: int
    replayed: int

    @property
    def total(self) -> int:
        return self.live + self.captured + self.replayed


def served(model: nn.Module) -> Served:
    """The counters of all regions of a model."""
    stats = [runner.stats for region in regions_of(model) for runner in region.runners]
    return Served(
        live=sum(each.live_calls.total() for each in stats),
        captured=sum(len(each.plans) + each.evictions for each in stats),
        replayed=sum(each.replays for each in stats),
    )


def plans(model: nn.Module) -> list[PlanStats]:
    """What is captured now, in all regions of a model."""
    return [plan for region in regions_of(model) for runner in region.runners for plan in runner.stats.plans]


def distinct_pieces(region: Region) -> int:
    """How many pieces of a region share their code with no earlier one."""
    return sum(piece.twin_of is None for piece in region.pieces)
