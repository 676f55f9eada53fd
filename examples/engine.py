"""A small inference engine: continuous batching, a paged KV cache, chunked prefill mixed with decode.

    python examples/engine.py

In every step the requests that decode bring one token each, and prompts fill the rest of the token budget, in chunks.
A step in which all requests decode is uniform: it is replayed as one CUDA graph, attention included (FULL). A step
with a piece of a prompt in it is replayed around an attention that runs live (PIECEWISE). Either is padded to the next
size of the ladder; padded rows have slot -1 and padded requests no tokens, so that neither can be seen in a result.

What an engine tells graphcap is in three places: :meth:`Engine.compile_model`, :meth:`Engine.forward` and, inside the
attention op, ``graphcap.current_step()``. Without a GPU it runs on the simulated device, which is not faster.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphcap

BLOCK = 16  # tokens in a block of the KV cache


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model; ``max_len`` is the longest request, a multiple of BLOCK."""

    hidden: int = 64
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    mlp: int = 128
    vocab: int = 256
    max_len: int = 128


def attend(q: Tensor, cache: Tensor, block_tables: Tensor, positions: Tensor) -> Tensor:
    """Causal attention over the blocks of each request; q [num_reqs, rows, heads, dim], positions [num_reqs, rows].

    All shapes are known beforehand: a graph may hold it. The heads that share a KV head are rows of one matrix.
    """
    slots = (block_tables.unsqueeze(-1) * BLOCK + torch.arange(BLOCK, device=q.device)).flatten(1)
    keys, values = (part[slots].transpose(1, 2) for part in cache)  # [num_reqs, kv_heads, max_len, dim]
    group = q.shape[2] // keys.shape[1]
    grouped = q.unflatten(2, (-1, group)).transpose(1, 2).flatten(2, 3)  # [num_reqs, kv_heads, rows * group, dim]
    seen = torch.arange(slots.shape[1], device=q.device) <= positions.unsqueeze(-1)
    mask = seen.repeat_interleave(group, dim=1).unsqueeze(1)
    out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
    return out.unflatten(2, (-1, group)).transpose(1, 2).flatten(2, 3)


@torch.library.custom_op("engine::paged_attention", mutates_args=("cache",))
def paged_attention(q: Tensor, k: Tensor, v: Tensor, cache: Tensor, slot_mapping: Tensor, positions: Tensor) -> Tensor:
    """Store k and v, then attend; the batch has the requests with one token first, then chunks of prompts.

    Shapes: q [num_tokens, heads, dim]; k, v [num_tokens, kv_heads, dim]; cache [2, num_slots + 1, kv_heads, dim], whose
    last row belongs to nobody; slot_mapping [num_tokens], -1 for that last row; positions [num_tokens].
    """
    cache[0, slot_mapping], cache[1, slot_mapping] = k, v
    step = graphcap.current_step()
    block_tables = step.inputs["block_tables"]  # [num_reqs, max_blocks]
    # Where the chunks are is known to the host, and no graph can follow it. A uniform batch has none.
    prompts = [] if step.key.uniform_query_len == 1 else step.inputs["prompts"]
    out, ones = torch.zeros_like(q), len(block_tables) - len(prompts)
    if ones:
        out[:ones] = attend(q[:ones, None], cache, block_tables[:ones], positions[:ones, None])[:, 0]
    for request, start, end in prompts:
        chunk = slice(start, end)
        out[chunk] = attend(q[None, chunk], cache, block_tables[request, None], positions[None, chunk])[0]
    return out


@paged_attention.register_fake
def _(q: Tensor, *_: Tensor) -> Tensor:
    return torch.zeros_like(q)


# An unknown op runs live. This one may be captured where every request of the batch brings one token.
graphcap.register_op(paged_attention, capture="uniform_single_token")


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotary embedding of x [num_tokens, heads, dim] by rotary [num_tokens, dim], cos and sin side by side."""
    (cos, sin), (first, second) = rotary.unsqueeze(1).chunk(2, dim=-1), x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Layer(nn.Module):
    """A decoder layer with its KV cache."""

    cache: Tensor

    def __init__(self, sizes: Sizes, num_blocks: int) -> None:
        super().__init__()
        self.heads = [sizes.heads, sizes.kv_heads, sizes.kv_heads]
        self.norm, self.post_norm = nn.RMSNorm(sizes.hidden), nn.RMSNorm(sizes.hidden)
        self.qkv = nn.Linear(sizes.hidden, sum(self.heads) * sizes.head_dim, bias=False)
        self.out = nn.Linear(sizes.heads * sizes.head_dim, sizes.hidden, bias=False)
        self.gate_up = nn.Linear(sizes.hidden, 2 * sizes.mlp, bias=False)
        self.down = nn.Linear(sizes.mlp, sizes.hidden, bias=False)
        cache = torch.zeros(2, num_blocks * BLOCK + 1, sizes.kv_heads, sizes.head_dim)
        self.register_buffer("cache", cache, persistent=False)

    def forward(self, x: Tensor, rotary: Tensor, positions: Tensor, slot_mapping: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (sum(self.heads), -1)).split(self.heads, dim=1)
        real = (slot_mapping >= 0)[:, None, None]  # nobody's row of the cache only ever gets zeros
        k, v = torch.where(real, rotate(k, rotary), 0), torch.where(real, v, 0)
        attended = torch.ops.engine.paged_attention(rotate(q, rotary), k, v, self.cache, slot_mapping, positions)
        x = x + self.out(attended.flatten(1))
        gate, up = self.gate_up(self.post_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Decoder(nn.Module):
    """``forward(input_ids, positions, slot_mapping)``, each [num_tokens] int64, gives [num_tokens, hidden]."""

    rotary: Tensor

    def __init__(self, sizes: Sizes, num_blocks: int) -> None:
        super().__init__()
        self.sizes = sizes
        self.num_blocks = num_blocks
        self.embed = nn.Embedding(sizes.vocab, sizes.hidden)
        self.layers = nn.ModuleList(Layer(sizes, num_blocks) for _ in range(sizes.layers))
        self.norm = nn.RMSNorm(sizes.hidden)
        self.head = nn.Linear(sizes.hidden, sizes.vocab, bias=False)
        speeds = 10000.0 ** -(torch.arange(0, sizes.head_dim, 2) / sizes.head_dim)
        angles = torch.arange(sizes.max_len)[:, None] * speeds
        self.register_buffer("rotary", torch.cat((angles.cos(), angles.sin()), dim=-1), persistent=False)

    def forward(self, input_ids: Tensor, positions: Tensor, slot_mapping: Tensor) -> Tensor:
        x, rotary = self.embed(input_ids), self.rotary[positions]
        for layer in self.layers:
            x = layer(x, rotary, positions, slot_mapping)
        return self.norm(x)


@dataclass(eq=False)
class Request:
    """A prompt and what has been generated so far, with its blocks of the cache."""

    tokens: list[int]
    max_new_tokens: int
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    table: Tensor | None = None
    """Its blocks on the device, [max_blocks], filled up with 0."""

    @property
    def num_left(self) -> int:
        """Tokens that the model has not seen: 1 while decoding."""
        return len(self.tokens) - self.num_computed


@dataclass(frozen=True)
class Batch:
    """One step: the model's arguments, and the metadata that the attention reads."""

    arguments: tuple[Tensor, ...]
    inputs: dict[str, Any]
    num_tokens: int
    num_reqs: int
    uniform_query_len: int | None


class Engine:
    """Requests wait, run, and leave; each step runs the model once for all that run."""

    def __init__(self, model: Decoder, max_num_reqs: int = 8, max_num_tokens: int = 32) -> None:
        self.model = model
        self.max_num_reqs, self.max_num_tokens = max_num_reqs, max_num_tokens
        self.device = model.rotary.device
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.free_blocks = list(range(model.num_blocks))

    def compile_model(self, **options: Any) -> None:
        """Hand the model to graphcap: which dims change, what fills padded rows, which sizes are captured."""
        tokens = {0: "num_tokens"}
        settings = {
            "dynamic_arg_dims": {"input_ids": tokens, "positions": tokens, "slot_mapping": tokens,
                                 "step.block_tables": {0: "num_reqs"}},
            "pad": {"slot_mapping": -1, "positions": 0},
            "cudagraph_mode": "FULL_AND_PIECEWISE",
            "max_num_reqs": self.max_num_reqs,
            "max_capture_size": self.max_num_tokens,
            "outputs": "static",  # step() has taken what it wants of them before the next one
            "guards": "sealed",  # nobody changes the model while it serves
            "simulate": self.device.type == "cpu",
        }  # fmt: skip
        graphcap.compile(self.model, **{**settings, **options})

    def add(self, prompt: list[int], max_new_tokens: int) -> Request:
        """A new request; it starts when there are blocks for all its tokens.

        Raises:
            ValueError: it is empty, or longer than the model or the cache can hold.
        """
        length, limit = len(prompt) + max_new_tokens, min(self.model.sizes.max_len, self.model.num_blocks * BLOCK)
        if not prompt or max_new_tokens < 1 or length > limit:
            raise ValueError(
                f"{len(prompt)} tokens and {max_new_tokens} new ones: expected 1 or more each, {limit} in all"
            )
        request = Request(list(prompt), max_new_tokens)
        self.waiting.append(request)
        return request

    def admit(self) -> None:
        """Start waiting requests in their order, each with the blocks that it will ever need."""
        while self.waiting and len(self.running) < self.max_num_reqs:
            request = self.waiting[0]
            num_blocks = -(-(len(request.tokens) + request.max_new_tokens) // BLOCK)
            if num_blocks > len(self.free_blocks):
                break
            request.blocks = [self.free_blocks.pop() for _ in range(num_blocks)]
            filled = request.blocks + [0] * (self.model.sizes.max_len // BLOCK - num_blocks)
            request.table = torch.tensor(filled, device=self.device)
            self.running.append(self.waiting.popleft())

    def schedule(self) -> list[tuple[Request, int]]:
        """What this step computes: (request, tokens); requests with one token come first."""
        self.admit()
        work, budget = [], self.max_num_tokens
        for request in sorted(self.running, key=lambda request: request.num_left > 1):
            if num_new := min(request.num_left, budget):
                work.append((request, num_new))
                budget -= num_new
        return sorted(work, key=lambda item: item[1] > 1)

    def batch(self, work: list[tuple[Request, int]]) -> Batch:
        """The tensors of a step."""
        ids, positions, slots, prompts = [], [], [], []
        for index, (request, num_new) in enumerate(work):
            span = range(request.num_computed, request.num_computed + num_new)
            if num_new > 1:
                prompts.append((index, len(ids), len(ids) + num_new))
            ids += request.tokens[span.start : span.stop]
            positions += span
            slots += [request.blocks[at // BLOCK] * BLOCK + at % BLOCK for at in span]
        arguments = tuple(torch.tensor(each, device=self.device) for each in (ids, positions, slots))
        inputs: dict[str, Any] = {"block_tables": torch.stack([request.table for request, _ in work])}
        if prompts:
            inputs["prompts"] = prompts
        return Batch(arguments, inputs, len(ids), len(work), None if prompts else 1)

    def forward(self, batch: Batch) -> Tensor:
        """Run the model, telling graphcap what kind of batch it gets."""
        with graphcap.step(batch.num_tokens, batch.num_reqs, batch.uniform_query_len, inputs=batch.inputs):
            return self.model(*batch.arguments)

    def step(self) -> list[Request]:
        """One forward; requests whose prompt is done get a token. Returns the requests that are complete."""
        work = self.schedule()
        hidden = self.forward(self.batch(work))
        last = torch.tensor([new for _, new in work]).cumsum(0).to(self.device) - 1
        for (request, num_new), token in zip(work, self.sample(hidden[last]), strict=True):
            request.num_computed += num_new
            if not request.num_left:
                request.tokens.append(token)
                request.max_new_tokens -= 1
        return [self.leave(request) for request, _ in work if not request.max_new_tokens]

    def leave(self, request: Request) -> Request:
        """Give back what a complete request held."""
        self.running.remove(request)
        self.free_blocks += request.blocks
        return request

    def sample(self, hidden: Tensor) -> list[int]:
        """The most likely token after each row of hidden [num_reqs, hidden]."""
        return self.model.head(hidden).argmax(-1).tolist()

    def make_inputs(self, key: graphcap.GraphKey) -> tuple[tuple[Tensor, ...], dict[str, Any], dict[str, Any]]:
        """A batch of this size that touches no request, for :func:`graphcap.capture`."""
        # Three tensors: one tensor given twice would be another graph than the one that serves.
        arguments = tuple(torch.full((key.num_tokens,), fill, device=self.device) for fill in (0, 0, -1))
        block_tables = arguments[0].new_zeros(key.num_reqs, self.model.sizes.max_len // BLOCK)
        return arguments, {}, {"block_tables": block_tables, "prompts": []}


def generate(engine: Engine, requests: list[tuple[list[int], int]]) -> list[list[int]]:
    """Serve (prompt, max_new_tokens), two new ones arriving at every step; the tokens of each, prompts included."""
    arriving, served = deque(requests), []
    while arriving or engine.waiting or engine.running:
        served += [engine.add(*arriving.popleft()) for _ in range(min(2, len(arriving)))]
        engine.step()
    return [request.tokens for request in served]


def main() -> None:
    torch.manual_seed(0)
    model = Decoder(Sizes(), num_blocks=64).eval().to("cuda" if torch.cuda.is_available() else "cpu")
    lengths = [(3, 20), (50, 6), (17, 12), (1, 25), (70, 4), (8, 8), (33, 16), (5, 5), (21, 30), (2, 9)]
    requests = [(torch.randint(256, (prompt,)).tolist(), new) for prompt, new in lengths]
    with torch.inference_mode():
        expected = generate(Engine(model), requests)
        engine = Engine(model)
        engine.compile_model()
        graphcap.capture(model, engine.make_inputs)
        with graphcap.allow_capture(False):  # no request waits for a capture
            tokens = generate(engine, requests)
    same = sum(mine == theirs for mine, theirs in zip(tokens, expected, strict=True))
    print(f"{same} of {len(requests)} requests have eager's tokens")
    report, modes = graphcap.explain(model), Counter()
    for plan in report.regions[0].plans:
        modes[plan.mode] += plan.replays
    print("replays by mode:", dict(modes))
    print(report)


if __name__ == "__main__":
    main()
