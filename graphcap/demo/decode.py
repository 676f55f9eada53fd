"""Prefill and decode, one timed step at a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from graphcap.compiler.region import all_regions
from graphcap.demo.decoder import Decoder

#: Takes the number of the step and its logits [batch, vocab], returns the next tokens [batch, 1].
Choose = Callable[[int, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Step:
    """One call of the model, the first one being the prefill.

    Attributes:
        seconds: wall clock, until the device has finished.
        served: what graphcap did: ``"compile"``, ``"capture"``, ``"replay"`` or ``"live"``; for an eager run, live.
    """

    seconds: float
    served: str


@dataclass(frozen=True)
class Run:
    """One prompt.

    Attributes:
        tokens: [batch, new_tokens], int64, on the CPU.
        logits: what they were chosen from, [new_tokens, batch, vocab], float32, on the CPU.
        steps: one per new token.
    """

    tokens: torch.Tensor
    logits: torch.Tensor
    steps: tuple[Step, ...]


def greedy(decoder: Decoder, prompt: torch.Tensor) -> Run:
    """Continue a prompt [batch, prompt_tokens] with the likeliest token at each step."""
    return _decode(decoder, prompt, lambda number, logits: logits.argmax(dim=-1, keepdim=True))


def forced(decoder: Decoder, prompt: torch.Tensor, tokens: torch.Tensor) -> Run:
    """Continue a prompt with the given tokens [batch, new_tokens], whatever the logits say."""
    # By step, so that a column has the strides of tokens that argmax makes: others would be traced again.
    columns = tokens.T.contiguous().to(prompt.device)
    return _decode(decoder, prompt, lambda number, logits: columns[number].clone().unsqueeze(1))


def _decode(decoder: Decoder, prompt: torch.Tensor, choose: Choose) -> Run:
    cache, device = decoder.fresh_cache(), prompt.device
    feed, fed = prompt, 0
    tokens, all_logits, steps = [], [], []
    for number in range(decoder.settings.new_tokens):
        positions = torch.arange(fed, fed + feed.shape[1], device=device).unsqueeze(0)
        before, started = _counters(), _now(device)
        output = decoder.model(
            input_ids=feed, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        seconds = _now(device) - started
        steps.append(Step(seconds, _served(before, _counters())))
        fed += feed.shape[1]
        logits = output.logits[:, -1]
        feed = choose(number, logits)
        tokens.append(feed.cpu())
        all_logits.append(logits.float().cpu())
    return Run(torch.cat(tokens, dim=1), torch.stack(all_logits), tuple(steps))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _counters() -> tuple[int, int, int]:
    """Regions, captures and replays so far."""
    regions = all_regions()
    stats = [runner.stats for region in regions for runner in region.runners]
    return (len(regions), sum(len(s.plans) + s.evictions for s in stats), sum(s.replays for s in stats))


def _served(before: tuple[int, int, int], after: tuple[int, int, int]) -> str:
    for kind, earlier, later in zip(("compile", "capture", "replay"), before, after, strict=True):
        if later > earlier:
            return kind
    return "live"
