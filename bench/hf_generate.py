"""What does ``generate()`` of Hugging Face models gain?

Llama and Qwen3 of two sizes with random bf16 weights generate 128 tokens greedily after a prompt of 128 random tokens,
with a DynamicCache and with a StaticCache. Each variant has its own modules over shared weights. First each makes two
calls by itself, with a reset Dynamo and empty compile caches on disk. Then all variants of a group (model, batch,
cache) are compiled once more, in one process, and timed in turns: one call of each a round, as a GPU's clock and its
neighbours change from minute to minute. (Two variants with one backend may share graphs there, as they may in any
process.) Reported per variant:

- *first call* and *second call*: seconds of the first two ``generate()`` calls, compilation and capture included;
- *time to first token*: from the call to the first logits, median of the timed calls;
- *tokens/s*: generated tokens of the batch after the first, over the time after the first token, median of the timed
  calls;
- *same tokens*: how many leading tokens equal eager's, for the worst sequence. In bf16 a fused kernel rounds
  differently, and one near tie changes everything after it: this column is for reading, not for failing.

    PYTHONPATH=. python -m bench.hf_generate --models llama-0.6b,qwen3-0.6b --batch 1
    PYTHONPATH=. python -m bench.hf_generate --tiny      # CPU: tries the bench; simulated device, meaningless times
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import graphcaps, harness
from bench.harness import say
from bench.hf_calls import Running, first_calls, prompt_of, take_turns
from bench.hf_variants import FAMILIES, VARIANTS, build_model
from bench.record import Record

CACHES = ("dynamic", "static")


def run_group(
    model: nn.Module, keys: list[dict[str, Any]], arguments: argparse.Namespace, reference: list[Tensor]
) -> Iterator[dict[str, Any]]:
    """The rows of one model, batch and cache. The first group of a batch leaves eager's tokens in ``reference``."""
    device, vocab_size = harness.default_device(), model.config.vocab_size
    prompts = [prompt_of(keys[0]["batch"], arguments.prompt_tokens, vocab_size, seed, device) for seed in range(2)]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        group = [Running(key, str(Path(folder) / str(number))) for number, key in enumerate(keys)]
        for running in group:
            first_calls(running, model, prompts, arguments)
            say(f"  {running.key['cache']:8s} {running.key['variant']:28s} {running.failure or 'compiled'}")
        cells = take_turns(group, model, prompts, arguments)
    reference += [call.tokens for call in group[0].first] if not reference else []
    for running, cell in zip(group, cells, strict=True):
        yield running.row(reference)
        if arguments.explain and cell is not None and running.key["variant"].startswith("graphcap"):
            say(graphcaps.report_text(cell.model))
    del cells, cell
    torch._dynamo.reset()
    harness.collect_garbage(device)


def describe(row: dict[str, Any]) -> str:
    """One line of progress for a finished cell."""
    where = f"  {row['cache']:8s} {row['variant']:28s}"
    if row["status"] != "ok":
        return f"{where} {row['status']}"
    return (
        f"{where} first call {row['first_call_s']:.1f} s, second {row['second_call_s']:.1f} s, first token"
        f" {row['first_token_ms']:.1f} ms, {row['tokens_per_s']:.0f} tokens/s,"
        f" same tokens {row['same_tokens']}/{row['new_tokens']}"
    )


def parse_arguments() -> argparse.Namespace:
    names = tuple(f"{family}-{size}" for size in ("0.6b", "8b") for family in FAMILIES)
    parser = harness.common_arguments(__doc__ or "", names, "hf_generate.json")
    parser.add_argument("--batch", default="1,8", help="comma separated; default %(default)s")
    parser.add_argument("--steps", type=int, default=128, help="new tokens of a call; default %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="timed calls of a cell; default %(default)s")
    parser.add_argument("--caches", default=",".join(CACHES), help="default %(default)s")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="default %(default)s")
    parser.add_argument("--explain", action="store_true", help="print graphcap's report of each of its cells")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    device = harness.default_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    record = Record(arguments.json, "hf_generate", device, key=("model", "batch", "cache", "variant"))
    names = ["llama-tiny", "qwen3-tiny"] if arguments.tiny else harness.words(arguments.models)
    for name in names:
        model = build_model(name, device, dtype)
        for batch in map(int, harness.words(arguments.batch)):
            reference: list[Tensor] = []
            for cache in harness.words(arguments.caches):
                say(f"{name}, batch {batch}")
                chosen = [each for each in VARIANTS if each == "eager" or harness.selected(each, arguments.only)]
                keys = [{"model": name, "batch": batch, "cache": cache, "variant": each} for each in chosen]
                # All variants run the same functions of transformers, for which Dynamo keeps so many graphs.
                with torch._dynamo.config.patch(recompile_limit=64):
                    for row in run_group(model, keys, arguments, reference):
                        record.put(row)
                        say(describe(row))
        del model
        harness.collect_garbage(device)


if __name__ == "__main__":
    main()
