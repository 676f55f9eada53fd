"""The lab decoder: a Llama-like model whose attention is an opaque custom op that writes a KV cache.

One token per sequence and a full KV context, as in the decode phase of an inference engine. Packed qkv and gate_up
projections, RMSNorm upcast to fp32 with the residual added, NeoX rotary embedding, no LM head. Random seeded weights.

The arithmetic between two attentions is written as free functions of tensors, so that the hand-made floors of
``handmade.py`` compile exactly what the model runs.
"""

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a lab decoder; ``context`` is the number of KV rows that every sequence attends to."""

    name: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    vocab_size: int = 32000
    context: int = 256
    eps: float = 1e-6
    rope_theta: float = 10000.0


CONFIGS = {
    "0.6b": DecoderConfig("0.6b", 1024, 28, 16, 8, 128, 3072),
    "8b": DecoderConfig("8b", 4096, 32, 32, 8, 128, 14336),
    "tiny": DecoderConfig("tiny", 64, 3, 4, 2, 16, 128, vocab_size=256, context=32),
}


def attend(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, out: Tensor
) -> None:
    """Write k and v into their cache slots, then attend over the whole context of each sequence.

    Shapes: q [num_tokens, num_heads, head_dim]; k, v [num_tokens, num_kv_heads, head_dim]; caches
    [max_sequences, context, num_kv_heads, head_dim]; slot_mapping [num_tokens] int64, a row of the caches with their
    first two dims flattened; out [num_tokens, num_heads * head_dim]. Token i belongs to sequence i.
    """
    k_cache.flatten(0, 1).index_copy_(0, slot_mapping, k)
    v_cache.flatten(0, 1).index_copy_(0, slot_mapping, v)
    num_tokens = q.shape[0]
    keys, values = k_cache[:num_tokens].transpose(1, 2), v_cache[:num_tokens].transpose(1, 2)
    attended = F.scaled_dot_product_attention(q.unsqueeze(2), keys, values, enable_gqa=True)
    out.copy_(attended.flatten(1))


M = TypeVar("M", bound=nn.Module)
_MUTATED = ("k_cache", "v_cache", "out")

torch.library.custom_op("lab::attention", mutates_args=_MUTATED)(attend)
torch.library.custom_op("lab::capturable_attention", mutates_args=_MUTATED)(attend)

#: the opaque op of the model; nothing tells a compiler that it could be captured
attention = torch.ops.lab.attention
#: the same op under a second name, for the variants that declare it capturable
capturable_attention = torch.ops.lab.capturable_attention


def rms_norm(hidden: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add the residual, normalise in fp32. Returns (normed, new residual), both [num_tokens, hidden_size]."""
    residual = hidden + residual
    wide = residual.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(hidden.dtype), residual


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """NeoX rotary embedding of x [num_tokens, heads, head_dim] with cos, sin [num_tokens, 1, head_dim / 2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def project_qkv(
    config: DecoderConfig, normed: Tensor, weight: Tensor, rotary: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The packed projection and the rotary embedding: q, k, v of :func:`attend`. rotary is [max_position, head_dim]."""
    cos, sin = rotary[positions].unsqueeze(1).chunk(2, dim=-1)
    qkv = F.linear(normed, weight).view(-1, config.num_heads + 2 * config.num_kv_heads, config.head_dim)
    q, k, v = torch.split(qkv, [config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1)
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def gated_mlp(normed: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """SiLU-gated MLP with the packed weight gate_up [2 * mlp_size, hidden_size]."""
    gate, up = F.linear(normed, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


class RMSNorm(nn.Module):
    """:func:`rms_norm` with its weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return rms_norm(hidden, residual, self.weight, self.eps)


class DecoderLayer(nn.Module):
    """One layer with its own KV cache of max_sequences sequences."""

    k_cache: Tensor
    v_cache: Tensor

    def __init__(self, config: DecoderConfig, max_sequences: int) -> None:
        super().__init__()
        self.config = config
        self.attention_op: Callable[..., None] = attention
        attended = config.num_heads * config.head_dim
        self.input_norm = RMSNorm(config.hidden_size, config.eps)
        self.qkv = nn.Linear(config.hidden_size, attended + 2 * config.num_kv_heads * config.head_dim, bias=False)
        self.o = nn.Linear(attended, config.hidden_size, bias=False)
        self.post_norm = RMSNorm(config.hidden_size, config.eps)
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.mlp_size, bias=False)
        self.down = nn.Linear(config.mlp_size, config.hidden_size, bias=False)
        for name in ("k_cache", "v_cache"):
            cache = torch.empty(max_sequences, config.context, config.num_kv_heads, config.head_dim)
            self.register_buffer(name, cache, persistent=False)

    def forward(
        self, hidden: Tensor, residual: Tensor, rotary: Tensor, positions: Tensor, slot_mapping: Tensor
    ) -> tuple[Tensor, Tensor]:
        normed, residual = self.input_norm(hidden, residual)
        q, k, v = project_qkv(self.config, normed, self.qkv.weight, rotary, positions)
        attended = normed.new_empty(q.shape[0], self.o.in_features)
        self.attention_op(q, k, v, self.k_cache, self.v_cache, slot_mapping, attended)
        normed, residual = self.post_norm(self.o(attended), residual)
        return gated_mlp(normed, self.gate_up.weight, self.down.weight), residual


class Decoder(nn.Module):
    """``forward(input_ids, positions, slot_mapping)``, each [num_tokens] int64, gives [num_tokens, hidden_size]."""

    rotary: Tensor

    def __init__(self, config: DecoderConfig, max_sequences: int) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, max_sequences) for _ in range(config.num_layers))
        self.final_norm = RMSNorm(config.hidden_size, config.eps)
        self.register_buffer("rotary", torch.empty(config.context, config.head_dim), persistent=False)

    def forward(self, input_ids: Tensor, positions: Tensor, slot_mapping: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        residual = torch.zeros_like(hidden)
        for layer in self.layers:
            hidden, residual = layer(hidden, residual, self.rotary, positions, slot_mapping)
        normed: Tensor = self.final_norm(hidden, residual)[0]
        return normed

    def decoder_layers(self) -> list[DecoderLayer]:
        """The layers, typed."""
        return [layer for layer in self.layers if isinstance(layer, DecoderLayer)]


def rotary_table(config: DecoderConfig, device: torch.device) -> Tensor:
    """cos and sin side by side, [context, head_dim] fp32."""
    powers = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    angles = torch.arange(config.context, device=device).float()[:, None] / config.rope_theta**powers
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def build_decoder(config: DecoderConfig, device: torch.device, dtype: torch.dtype, max_sequences: int) -> Decoder:
    """A decoder with seeded random weights and KV caches, scaled so that activations stay near one."""
    with torch.device("meta"):
        model = Decoder(config, max_sequences).to(dtype)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0)
        else:
            parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
    model.rotary.copy_(rotary_table(config, device))
    fill_caches(model)
    return model


def caches(model: Decoder) -> list[Tensor]:
    """The KV caches of all layers."""
    return [buffer for name, buffer in model.named_buffers() if name.endswith("_cache")]


def fill_caches(model: Decoder) -> None:
    """Fill the KV caches with the same random rows every time: undoes what earlier steps wrote."""
    generator = torch.Generator(model.rotary.device).manual_seed(1)
    for cache in caches(model):
        cache.normal_(generator=generator)


def poison_slots(model: Decoder, slot_mapping: Tensor) -> None:
    """NaN in the cache rows that a step is about to write: a write that does not happen shows in its output."""
    for cache in caches(model):
        cache.flatten(0, 1)[slot_mapping] = torch.nan


def float_copy(model: M) -> M:
    """A copy with fp32 parameters and buffers."""
    return copy.deepcopy(model).float()


def share_tensors(model: M) -> M:
    """A copy of the module tree over the same parameters and buffers, so that each variant owns its module."""
    memo = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, memo)


def decode_inputs(config: DecoderConfig, device: torch.device, num_tokens: int, seed: int) -> tuple[Tensor, ...]:
    """Inputs of one decode step: (input_ids, positions, slot_mapping), new tensors on every call."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(config.vocab_size, (num_tokens,), generator=generator)
    positions = torch.randint(config.context, (num_tokens,), generator=generator)
    slot_mapping = torch.arange(num_tokens) * config.context + positions
    return tuple(tensor.to(device) for tensor in (input_ids, positions, slot_mapping))
