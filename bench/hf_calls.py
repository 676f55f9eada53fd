"""The calls of ``hf_generate.py``: ``generate()`` with its times, of variants by themselves and in turns."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from bench import graphcaps, harness, models
from bench.hf_variants import VARIANTS, Cell


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
def compile_caches(folder: str) -> Iterator[None]:
    """Inductor's, Triton's and our cache in a directory."""
    names = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "GRAPHCAP_CACHE_DIR": "graphcap"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update({name: str(Path(folder) / part) for name, part in names.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@dataclass
class Running:
    """A variant of a group.

    Attributes:
        key: of its row.
        caches: the directory of its compile caches.
        first: the first two calls in a process that has compiled nothing of it.
        calls: those after it was compiled again.
        failure: why there are no more.
    """

    key: dict[str, Any]
    caches: str
    first: list[Generation] = field(default_factory=list)
    calls: list[Generation] = field(default_factory=list)
    failure: str = ""

    def compile(self, model: nn.Module, arguments: argparse.Namespace) -> Cell | None:
        """A module of its own, compiled as the variant has it; ``None`` where that fails."""
        options = {**graphcaps.device_options(harness.default_device()), **json.loads(arguments.graphcap_options)}
        cell = Cell(models.share_tensors(model), self.key["cache"], options, {})
        try:
            VARIANTS[self.key["variant"]](cell)
        except Exception as error:
            self.failure = harness.failure(error)
        return None if self.failure else cell

    def call(self, cell: Cell | None, prompts: list[Tensor], new_tokens: int, calls: list[Generation]) -> None:
        """One more call, unless one has failed. Prompts take turns."""
        if cell is not None and not self.failure:
            try:
                calls.append(generate(cell, prompts[len(calls) % len(prompts)], new_tokens))
            except Exception as error:
                self.failure = harness.failure(error)

    def row(self, reference: list[Tensor]) -> dict[str, Any]:
        """Its figures; ``reference`` has eager's tokens for each prompt."""
        if self.failure:
            return {**self.key, "status": self.failure}
        timed, new_tokens = self.calls[2:], self.calls[0].tokens.shape[1]
        decoded = self.key["batch"] * (new_tokens - 1)
        pairs = [(call.tokens, reference[i % 2]) for calls in (self.first, self.calls) for i, call in enumerate(calls)]
        return {
            **self.key,
            "status": "ok",
            "first_call_s": self.first[0].total,
            "second_call_s": self.first[1].total,
            "first_token_ms": statistics.median(call.to_first_token for call in timed) * 1e3,
            "tokens_per_s": statistics.median(decoded / (call.total - call.to_first_token) for call in timed),
            "same_tokens": min(leading_equal(tokens, expected) for tokens, expected in pairs),
            "new_tokens": new_tokens,
        }


def first_calls(running: Running, model: nn.Module, prompts: list[Tensor], arguments: argparse.Namespace) -> None:
    """The calls of a variant that is alone and has no caches."""
    with compile_caches(running.caches):
        cell = running.compile(model, arguments)
        for _ in range(2):
            running.call(cell, prompts, arguments.steps, running.first)
    torch._dynamo.reset()
    del cell
    harness.collect_garbage(prompts[0].device)


def take_turns(
    group: list[Running], model: nn.Module, prompts: list[Tensor], arguments: argparse.Namespace
) -> list[Cell | None]:
    """The timed calls, after two of each variant. Returns what was called."""
    cells = []
    for running in group:
        with compile_caches(running.caches):
            cells.append(running.compile(model, arguments) if not running.failure else None)
            for _ in range(2):
                running.call(cells[-1], prompts, arguments.steps, running.calls)
    for _ in range(arguments.rounds):
        for running, cell in zip(group, cells, strict=True):
            running.call(cell, prompts, arguments.steps, running.calls)
    return cells
