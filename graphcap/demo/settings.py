"""The options of ``graphcap demo``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Sizes:
    """A decoder with random weights; ``head_dim`` divides ``hidden``."""

    layers: int
    hidden: int
    head_dim: int
    vocab: int


#: Small enough for two CPU cores to compile within a minute; on a GPU about 0.6 billion parameters.
DEFAULTS = {"cpu": Sizes(2, 64, 16, 512), "cuda": Sizes(28, 1024, 64, 151936)}


@dataclass(frozen=True)
class Settings:
    """What to run.

    Attributes:
        device: a GPU where there is one; on the CPU graphcap captures on its simulated device.
        dtype: of the weights, both eager and graphcap.
        architecture: ``"llama"`` or ``"qwen3"``; unused with ``checkpoint``.
        checkpoint: a folder with safetensors weights, ``None`` for random weights.
        sizes: of a decoder with random weights.
        batch: sequences per call.
        prompt_tokens: length of each prompt, for a model without a tokenizer.
        new_tokens: decoded tokens per sequence, the one that the prefill gives included.
        cache: ``"static"`` or ``"dynamic"``.
        json: print one JSON object and nothing else.
    """

    device: torch.device
    dtype: torch.dtype
    architecture: str
    checkpoint: Path | None
    sizes: Sizes
    batch: int
    prompt_tokens: int
    new_tokens: int
    cache: str
    json: bool


def parse(argv: Sequence[str]) -> Settings:
    """Read the command line; a mistake ends the program with a message, as argparse does."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    defaults = DEFAULTS[device.type]
    parser = _parser(defaults, "bf16" if device.type == "cuda" else "fp32", 128 if device.type == "cuda" else 32)
    given = parser.parse_args(argv)
    sizes = Sizes(given.layers, given.hidden, defaults.head_dim, defaults.vocab)
    if given.model is not None and not given.model.is_dir():
        parser.error(f"--model {given.model}: no such folder")
    if sizes.hidden % (2 * sizes.head_dim):
        parser.error(f"--hidden {sizes.hidden}: must be a multiple of {2 * sizes.head_dim}")
    return Settings(
        device=device,
        dtype=DTYPES[given.dtype],
        architecture=given.arch,
        checkpoint=given.model,
        sizes=sizes,
        batch=given.batch,
        prompt_tokens=given.prompt_tokens,
        new_tokens=given.tokens,
        cache=given.cache,
        json=given.json,
    )


def _parser(sizes: Sizes, dtype: str, tokens: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="graphcap demo",
        description="Run a Hugging Face decoder eager and through graphcap, compare the results, and show the report.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", type=Path, metavar="PATH", help="a local checkpoint folder to load")
    parser.add_argument("--arch", choices=("llama", "qwen3"), default="llama", help="architecture of random weights")
    parser.add_argument("--layers", type=_positive, default=sizes.layers, help="layers of random weights")
    parser.add_argument("--hidden", type=_positive, default=sizes.hidden, help="hidden size of random weights")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default=dtype, help="type of weights and activations")
    parser.add_argument("--batch", type=_positive, default=1, help="sequences per call")
    parser.add_argument("--prompt-tokens", type=_positive, default=16, help="length of a random prompt")
    parser.add_argument("--tokens", type=_at_least_two, default=tokens, help="tokens to decode per sequence")
    parser.add_argument("--cache", choices=("static", "dynamic"), default="static", help="kind of KV cache")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser


def _positive(text: str) -> int:
    return _at_least(1, text)


def _at_least_two(text: str) -> int:
    return _at_least(2, text)


def _at_least(least: int, text: str) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected an integer >= {least}, got {text!r}")
    return int(text)
