"""The ways to run one step of the engine that ``bench/engine.py`` times.

The hand-made runner is what engines carry: FULL graphs of pure decode batches at the sizes of a ladder, captured
largest first over static buffers of the largest size, and mixed batches compiled but without graphs. It checks nothing.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import graphcap
from bench import graphcaps, harness, models
from examples.engine import BLOCK, Batch, Decoder, Engine, Sizes

Runner = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Limits:
    """What an engine of the bench may hold, and the sizes of decode batches that are captured."""

    sizes: Sizes
    max_num_reqs: int
    max_num_tokens: int
    ladder: tuple[int, ...]

    @property
    def num_blocks(self) -> int:
        """Blocks for max_num_reqs requests of the greatest length."""
        return self.max_num_reqs * self.sizes.max_len // BLOCK


#: decode batches 1, 2, 4, 8..64 by 8, and the mixed ones above up to the budget of tokens
LADDER = (1, 2, 4, *range(8, 65, 8))
LIMITS = {
    "0.6b": Limits(Sizes(1024, 28, 16, 8, 128, 3072, 32000, 256), 64, 256, (*LADDER, *range(80, 257, 16))),
    "tiny": Limits(Sizes(), 8, 32, (1, 2, 4, 8, 16, 32)),
}


@dataclass
class Setup:
    """What the variants of one model share: weights, and caches that each run of a traffic fills anew."""

    model: Decoder
    limits: Limits
    graphcap_options: dict[str, Any] = field(default_factory=dict)

    def engine(self, runner: Runner | None = None, model: Decoder | None = None) -> Engine:
        """An idle engine. Its steps run through ``runner`` where one is given."""
        engine = Engine(model or self.model, self.limits.max_num_reqs, self.limits.max_num_tokens)
        if runner is not None:
            engine.forward = runner  # type: ignore[method-assign]
        return engine


def plain(model: Callable[..., Tensor]) -> Runner:
    """Any callable as it is; the step carries the attention's metadata."""

    def run(batch: Batch) -> Tensor:
        with graphcap.step(batch.num_tokens, batch.num_reqs, batch.uniform_query_len, inputs=batch.inputs):
            return model(*batch.arguments)

    return run


def replay_of(fn: Callable[[], Tensor], pool: Any) -> tuple[Callable[[], object], Tensor]:
    """A captured call and its static output. On a CPU, where there is no graph, the call itself into a fixed output."""
    output = fn()
    if output.device.type != "cuda":
        return lambda: output.copy_(fn()), output
    stream, graph = harness.side_stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for _ in range(2):
            fn()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        output = fn()
    return graph.replay, output


class HandMade:
    """Graphs of decode batches over static buffers, all in one memory pool; call it with a batch."""

    def __init__(self, setup: Setup, compiled: Callable[..., Tensor]) -> None:
        limits, device = setup.limits, setup.model.rotary.device
        self._mixed = plain(compiled)
        self._rungs = [size for size in limits.ladder if size <= limits.max_num_reqs]
        largest = self._rungs[-1]
        self._ids, self._positions, self._slots = (
            torch.zeros(largest, dtype=torch.int64, device=device) for _ in range(3)
        )
        max_blocks = limits.sizes.max_len // BLOCK
        self._block_tables = torch.zeros(largest, max_blocks, dtype=torch.int64, device=device)
        self._slots.fill_(-1)
        self._replays: dict[int, tuple[Callable[[], object], Tensor]] = {}
        pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        for size in reversed(self._rungs):
            arguments = (self._ids[:size], self._positions[:size], self._slots[:size])
            batch = Batch(arguments, {"block_tables": self._block_tables[:size]}, size, size, 1)
            self._replays[size] = replay_of(lambda batch=batch: self._mixed(batch), pool)  # type: ignore[misc]

    def __call__(self, batch: Batch) -> Tensor:
        num_reqs = batch.num_reqs
        if batch.uniform_query_len != 1 or num_reqs > self._rungs[-1]:
            return self._mixed(batch)
        rung = self._rungs[bisect.bisect_left(self._rungs, num_reqs)]
        targets = [self._ids[:num_reqs], self._positions[:num_reqs], self._slots[:num_reqs]]
        torch._foreach_copy_(targets, batch.arguments)
        self._block_tables[:num_reqs].copy_(batch.inputs["block_tables"])
        if num_reqs < rung:  # a padded request attends to one slot and writes to the row that belongs to nobody
            self._slots[num_reqs:rung].fill_(-1)
            self._positions[num_reqs:rung].zero_()
        replay, output = self._replays[rung]
        replay()
        return output[:num_reqs]


def eager(setup: Setup) -> Runner:
    return plain(setup.model)


def compiled(setup: Setup) -> Runner:
    return plain(torch.compile(models.share_tensors(setup.model), dynamic=True))


def hand_made(setup: Setup) -> Runner:
    return HandMade(setup, torch.compile(models.share_tensors(setup.model), dynamic=True))


def graphcapped(**options: Any) -> Callable[[Setup], Runner]:
    """The engine's own way, with its ladder captured before the first request."""

    def build(setup: Setup) -> Runner:
        model = models.share_tensors(setup.model)
        engine = setup.engine(model=model)
        device = graphcaps.device_options(engine.device)
        ladder = {"capture_sizes": setup.limits.ladder}
        engine.compile_model(**{**ladder, **device, **options, **setup.graphcap_options})
        graphcap.capture(model, engine.make_inputs)
        return engine.forward

    return build


HAND_MADE = "hand-made runner"
VARIANTS: dict[str, Callable[[Setup], Runner]] = {
    "eager": eager,
    "torch.compile default": compiled,
    HAND_MADE: hand_made,
    "graphcap FULL_AND_PIECEWISE": graphcapped(),
    "graphcap FULL_AND_PIECEWISE clone, full guards": graphcapped(outputs="clone", guards="full"),
    "graphcap PIECEWISE": graphcapped(cudagraph_mode="PIECEWISE"),
}
