"""A Hugging Face decoder, its prompts and its KV cache."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from graphcap.demo.settings import Settings
from graphcap.errors import MissingExtraError

#: For a checkpoint that brings a tokenizer; random token ids otherwise.
TEXTS = (
    "The quick brown fox jumps over the lazy dog because it has somewhere else to be",
    "A compiler reads the whole program before it says anything, which is more than",
)


@dataclass(frozen=True)
class Decoder:
    """A causal LM in evaluation mode.

    Attributes:
        model: the module; called with ``input_ids``, ``position_ids`` and ``past_key_values``.
        prompts: two prompts of one shape, [batch, prompt_tokens], int64.
        settings: what was asked for.
        cache: the KV cache, emptied by :meth:`fresh_cache`; ``None`` for caches that are made anew.
    """

    model: Any
    prompts: tuple[torch.Tensor, torch.Tensor]
    settings: Settings
    cache: Any

    def fresh_cache(self) -> Any:
        """An empty KV cache. A static one is the same object each time: graphs read and write it in place."""
        if self.cache is None:
            return _transformers().DynamicCache(config=self.model.config)
        self.cache.reset()
        return self.cache

    def in_fp32(self) -> Decoder:
        """The same decoder with a copy of the weights in fp32."""
        model = copy.deepcopy(self.model).float()
        return replace(self, model=model, cache=_cache(model, self.settings, self.prompts[0].shape[1]))

    def describe(self) -> dict[str, Any]:
        """What was built, for the report."""
        config = self.model.config
        return {
            "class": type(self.model).__name__,
            "weights": str(self.settings.checkpoint or "random"),
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "layers": config.num_hidden_layers,
            "hidden": config.hidden_size,
            "transformers": _transformers().__version__,
        }


def build_decoder(settings: Settings) -> Decoder:
    """Build or load the decoder that the settings ask for.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    transformers = _transformers()
    transformers.logging.set_verbosity_error()
    if settings.checkpoint is None:
        model = _random_model(settings)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            settings.checkpoint, dtype=settings.dtype, local_files_only=True, use_safetensors=True
        )
    model = model.to(settings.device).eval().requires_grad_(False)
    prompts = _prompts(model.config.vocab_size, settings)
    return Decoder(model, prompts, settings, _cache(model, settings, prompts[0].shape[1]))


def _random_model(settings: Settings) -> Any:
    transformers, sizes = _transformers(), settings.sizes
    config_class = {"llama": transformers.LlamaConfig, "qwen3": transformers.Qwen3Config}[settings.architecture]
    heads = sizes.hidden // sizes.head_dim
    config = config_class(
        vocab_size=sizes.vocab,
        hidden_size=sizes.hidden,
        intermediate_size=3 * sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=sizes.head_dim,
        max_position_embeddings=4096,
        # The usual 0.02 lets a small decoder repeat itself whatever its cache holds: equal tokens would show nothing.
        initializer_range=1 / math.sqrt(sizes.hidden),
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    with settings.device:
        return transformers.AutoModelForCausalLM.from_config(config, dtype=settings.dtype)


def _prompts(vocab: int, settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    if settings.checkpoint is not None and (settings.checkpoint / "tokenizer.json").exists():
        rows = _tokenized(settings.checkpoint)
    else:
        generator = torch.Generator().manual_seed(0)
        rows = [torch.randint(0, vocab, (settings.prompt_tokens,), generator=generator) for _ in TEXTS]
    first, second = (row.expand(settings.batch, -1).contiguous().to(settings.device) for row in rows)
    return first, second


def _tokenized(checkpoint: Path) -> list[torch.Tensor]:
    tokenizer = _transformers().AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    rows = [torch.tensor(tokenizer(text)["input_ids"]) for text in TEXTS]
    return [row[: min(map(len, rows))] for row in rows]


def _cache(model: Any, settings: Settings, prompt_tokens: int) -> Any:
    if settings.cache == "dynamic":
        return None
    # The last token is chosen and never fed back: it needs no row.
    return _transformers().StaticCache(config=model.config, max_cache_len=prompt_tokens + settings.new_tokens - 1)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise MissingExtraError("demo", "transformers", "graphcap demo") from None
    return transformers
