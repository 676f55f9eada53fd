"""An engine's decoder: attention is an opaque op that writes a paged KV cache, and every step is another mix.

graphcap knows nothing about the op, so it runs live; the pieces around it are captured. The op reads sequence lengths
on the host, which is what a capture could not hold.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import graphcap
from tests.models.decoders import distinct_pieces, plans, regions_of, served

BLOCK = 4
NUM_BLOCKS = 24
MAX_BLOCKS = 6
HEADS, HEAD_DIM = 2, 8
HIDDEN = HEADS * HEAD_DIM
LAYERS = 3
VOCAB = 64


@torch.library.custom_op("graphcap_tests::paged_attention", mutates_args=("keys", "values"))
def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    slot_mapping: Tensor,
    block_tables: Tensor,
    query_lens: Tensor,
    seq_lens: Tensor,
) -> Tensor:
    """Store k and v in the cache, then attend causally, sequence by sequence.

    Args:
        q, k, v: [num_tokens, heads, head_dim], the sequences of the batch one after the other.
        keys, values: [num_blocks * block, heads, head_dim], the cache.
        slot_mapping: [num_tokens], the row of the cache for each token.
        block_tables: [num_reqs, max_blocks], the blocks of each sequence.
        query_lens, seq_lens: [num_reqs], tokens of this step, and all tokens so far.
    """
    keys[slot_mapping], values[slot_mapping] = k, v
    out, start = torch.empty_like(q), 0
    for row, (queries, length) in enumerate(zip(query_lens.tolist(), seq_lens.tolist(), strict=True)):
        slots = (block_tables[row, :, None] * BLOCK + torch.arange(BLOCK)).flatten()[:length]
        visible = torch.arange(length) <= torch.arange(length - queries, length)[:, None]
        scores = torch.einsum("qhd,khd->hqk", q[start : start + queries], keys[slots]) / HEAD_DIM**0.5
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        out[start : start + queries] = torch.einsum("hqk,khd->qhd", weights, values[slots])
        start += queries
    return out


@paged_attention.register_fake
def _(q: Tensor, *_: Tensor) -> Tensor:
    return torch.empty_like(q)


@dataclass
class Metadata:
    slot_mapping: Tensor
    block_tables: Tensor
    query_lens: Tensor
    seq_lens: Tensor


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.post_norm = nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, 2 * HIDDEN), nn.Linear(2 * HIDDEN, HIDDEN)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(NUM_BLOCKS * BLOCK, HEADS, HEAD_DIM))

    def forward(self, x: Tensor, metadata: Metadata) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).view(-1, 3, HEADS, HEAD_DIM).unbind(1)
        attended = torch.ops.graphcap_tests.paged_attention(
            q, k, v, self.keys, self.values,
            metadata.slot_mapping, metadata.block_tables, metadata.query_lens, metadata.seq_lens,
        )  # fmt: skip
        x = x + self.out(attended.flatten(1))
        return x + self.down(torch.nn.functional.silu(self.up(self.post_norm(x))))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = nn.Linear(HIDDEN, VOCAB)

    def forward(self, input_ids: Tensor, metadata: Metadata) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, metadata)
        return self.head(x)


@dataclass
class Engine:
    """Sequences by number, each with its tokens and its blocks, handed out in the order of demand."""

    model: nn.Module
    tokens: dict[int, list[int]] = field(default_factory=dict)
    blocks: dict[int, list[int]] = field(default_factory=dict)
    num_blocks: int = 0

    def step(self, work: dict[int, list[int]]) -> Tensor:
        """Feed each sequence its new tokens; returns the logits of every token, [num_tokens, vocab]."""
        slots: list[int] = []
        for sequence, new in work.items():
            known, blocks = self.tokens.setdefault(sequence, []), self.blocks.setdefault(sequence, [])
            for token in new:
                if len(known) % BLOCK == 0:
                    # Not in order, so that a table is no plain range.
                    blocks.append(self.num_blocks * 5 % NUM_BLOCKS)
                    self.num_blocks += 1
                slots.append(blocks[-1] * BLOCK + len(known) % BLOCK)
                known.append(token)
        metadata = Metadata(
            torch.tensor(slots),
            torch.tensor([self.blocks[s] + [0] * (MAX_BLOCKS - len(self.blocks[s])) for s in work]),
            torch.tensor([len(new) for new in work.values()]),
            torch.tensor([len(self.tokens[s]) for s in work]),
        )
        with torch.inference_mode():
            return self.model(torch.tensor([token for new in work.values() for token in new]), metadata)


def mixed_steps() -> list[dict[int, list[int]]]:
    """Two prompts, decoding, a third prompt in the middle of it, decoding of all three, one sequence leaves."""
    steps: list[dict[int, list[int]]] = [{0: [3, 1, 4, 1, 5], 1: [9, 2, 6]}]
    steps += [{0: [10 + i], 1: [20 + i]} for i in range(5)]
    steps += [{0: [15], 1: [25], 2: [5, 3, 5, 8]}]
    steps += [{0: [30 + i], 1: [40 + i], 2: [50 + i]} for i in range(5)]
    steps += [{1: [60 - i], 2: [50 - i]} for i in range(4)]
    steps += [{3: [7, 7, 7], 2: [1]}]
    return steps


def test_opaque_attention_runs_live_between_captured_pieces() -> None:
    torch.manual_seed(0)
    model = Decoder().eval()
    eager, ours = Engine(copy.deepcopy(model)), Engine(model)
    tokens, reqs = {0: "num_tokens"}, {0: "num_reqs"}
    graphcap.compile(
        model,
        dynamic_arg_dims={
            "input_ids": tokens,
            "metadata": {"slot_mapping": tokens, "block_tables": reqs, "query_lens": reqs, "seq_lens": reqs},
        },
        simulate=True,
        compiler="eager",
    )
    for work in mixed_steps():
        assert torch.equal(ours.step(work), eager.step(work)), work
        for mine, theirs in zip(model.buffers(), eager.model.buffers(), strict=True):
            assert torch.equal(mine, theirs), work

    (region,) = regions_of(model)
    assert (len(region.pieces), distinct_pieces(region)) == (2 * LAYERS + 1, 4)
    assert served(model).total == len(mixed_steps())
    # Two tokens come 9 times, three tokens 5 times; each is captured at the third.
    assert sorted((plan.key[0], plan.replays) for plan in plans(model)) == [(2, 6), (3, 2)]
    for plan in plans(model):
        assert (plan.mode, plan.num_segments, len(plan.live)) == ("PIECEWISE", LAYERS + 1, LAYERS)
        assert all("paged_attention" in reason for reason in plan.live.values())
