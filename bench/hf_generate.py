"""What does ``generate()`` of Hugging Face models gain?

Llama and Qwen3 of two sizes with random bf16 weights generate 128 tokens greedily after a prompt of 128 random tokens,
with a DynamicCache and with a StaticCache. Each cell (model, batch, cache, variant) has its own module over shared
weights, a reset Dynamo and empty compile caches on disk. Reported per cell:

- *first call* and *second call*: seconds of the first two ``generate()`` calls, compilation and capture included;
- *time to first token*: from the call to the first logits, median of the timed calls;
- *tokens/s*: generated tokens of the batch after the first, over the time after the first token;
- *same tokens*: how many leading tokens equal eager's, for the worst sequence. In bf16 a fused kernel rounds
  differently, and one near tie changes everything after it: this column is for reading, not for failing.

    PYTHONPATH=. python -m bench.hf_generate --models llama-0.6b,qwen3-0.6b --batch 1
    PYTHONPATH=. python -m bench.hf_generate --tiny      # CPU: tries the bench; simulated device, meaningless times
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from bench import graphcaps, harness, models
from bench.harness import say
from bench.hf_variants import FAMILIES, VARIANTS, Cell, build_model
from bench.record import Record

CACHES = ("dynamic", "static")


class FirstTokenClock(transformers.LogitsProcessor):
    """Notes when the first logits of a ``generate()`` call are there; changes nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.first: float | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.first is None:
            harness.synchronize(self.device)
            self.first = time.perf_counter()
        return scores


@dataclass(frozen=True)
class Generation:
    """One ``generate()`` call: the new tokens [batch, new_tokens] on the host, and its times in seconds."""

    tokens: Tensor
    to_first_token: float
    total: float


def generate(cell: Cell, prompt: Tensor, new_tokens: int) -> Generation:
    """Greedy decoding of exactly new_tokens tokens for prompt [batch, prompt_tokens]."""
    clock = FirstTokenClock(prompt.device)
    harness.synchronize(prompt.device)
    start = time.perf_counter()
    sequences = cell.model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        cache_implementation=cell.cache,
        logits_processor=transformers.LogitsProcessorList([clock]),
        **cell.arguments,
    )
    harness.synchronize(prompt.device)
    total = time.perf_counter() - start
    assert clock.first is not None
    return Generation(sequences[:, prompt.shape[1] :].cpu(), clock.first - start, total)


def prompt_of(batch: int, num_tokens: int, vocab_size: int, seed: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, vocab_size, (batch, num_tokens), generator=generator).to(device)


def leading_equal(tokens: Tensor, reference: Tensor) -> int:
    """How many leading tokens are equal in the worst sequence; both [batch, new_tokens]."""
    return int((tokens == reference).int().cumprod(dim=1).sum(dim=1).min())


@contextmanager
def empty_compile_caches() -> Iterator[None]:
    """Inductor's, Triton's and our cache in a directory that goes away: the first call is a cold one."""
    names = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "GRAPHCAP_CACHE_DIR": "graphcap"}
    before = {name: os.environ.get(name) for name in names}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ.update({name: str(Path(folder) / part) for name, part in names.items()})
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


def measure(cell: Cell, arguments: argparse.Namespace, batch: int, reference: list[Tensor]) -> dict[str, Any]:
    """The figures of one cell. The first cell of a group (eager) leaves its tokens in ``reference``."""
    device, vocab_size = cell.model.device, cell.model.config.vocab_size
    prompts = [prompt_of(batch, arguments.prompt_tokens, vocab_size, seed, device) for seed in range(2)]
    runs = [generate(cell, prompts[index % 2], arguments.steps) for index in range(2 + arguments.rounds)]
    timed = runs[2:]
    if not reference:
        reference += [runs[0].tokens, runs[1].tokens]
    decoded = batch * (arguments.steps - 1)
    return {
        "first_call_s": runs[0].total,
        "second_call_s": runs[1].total,
        "first_token_ms": statistics.median(run.to_first_token for run in timed) * 1e3,
        "tokens_per_s": statistics.median(decoded / (run.total - run.to_first_token) for run in timed),
        "same_tokens": min(leading_equal(run.tokens, reference[i % 2]) for i, run in enumerate(runs)),
        "new_tokens": arguments.steps,
    }


def run_cell(model: nn.Module, key: dict[str, Any], arguments: argparse.Namespace, reference: list[Tensor]) -> Any:
    """One cell from its own module to its row."""
    device = harness.default_device()
    options = {**graphcaps.device_options(device), **json.loads(arguments.graphcap_options)}
    cell = Cell(models.share_tensors(model), key["cache"], options, {})
    with empty_compile_caches():
        try:
            VARIANTS[key["variant"]](cell)
            row = {**key, "status": "ok", **measure(cell, arguments, key["batch"], reference)}
            if arguments.explain and key["variant"].startswith("graphcap"):
                say(graphcaps.report_text(cell.model))
        except Exception as error:
            row = {**key, "status": harness.failure(error)}
        finally:
            del cell
            torch._dynamo.reset()
            harness.collect_garbage(device)
    return row


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
                for variant in VARIANTS:
                    if variant == "eager" or harness.selected(variant, arguments.only):
                        key = {"model": name, "batch": batch, "cache": cache, "variant": variant}
                        row = run_cell(model, key, arguments, reference)
                        record.put(row)
                        say(describe(row))
        del model
        harness.collect_garbage(device)


if __name__ == "__main__":
    main()
