"""The floors: what CUDA graphs give when written by hand for exactly this model and this batch size.

Both copy the three inputs into static buffers with one grouped copy, replay, and return a static output, as an
engine with its own model runner would. They check nothing and serve one batch size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench import harness
from bench.harness import Skipped
from bench.models import Decoder, DecoderConfig, DecoderLayer, gated_mlp, project_qkv, rms_norm

Forward = Callable[..., Tensor]
Attention = Callable[..., None]


def require_cuda(tensor: Tensor) -> None:
    if tensor.device.type != "cuda":
        raise Skipped("needs CUDA")


def capture_nothing(device: torch.device) -> None:
    """Capture and replay one kernel, for all that the driver and torch do at the first graph of a process."""
    if device.type != "cuda":
        return
    one, graph = torch.ones(1, device=device), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=harness.side_stream(), capture_error_mode="thread_local"):
        one.mul_(1)
    graph.replay()


def full_graph(compiled: Forward, inputs: Sequence[Tensor], pool: Any = None) -> Forward:
    """One CUDA graph of a compiled forward, attention included, in a memory pool of its own or in ``pool``.

    Captured for the shapes of ``inputs``.
    """
    require_cuda(inputs[0])
    static_inputs = [tensor.clone() for tensor in inputs]
    graph, stream = torch.cuda.CUDAGraph(), harness.side_stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            compiled(*static_inputs)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        output = compiled(*static_inputs)
    replay = graph.replay

    def step(*inputs: Tensor) -> Tensor:
        torch._foreach_copy_(static_inputs, inputs)
        replay()
        return output

    return step


class CompiledPieces:
    """The Inductor-compiled code between two attentions: three functions serve every layer.

    Each takes the residual of the piece before it first; ``first`` and ``middle`` return (q, k, v, residual). With
    ``dynamic`` they serve every batch size.
    """

    def __init__(self, config: DecoderConfig, dynamic: bool = False) -> None:
        def first(_: None, ids: Tensor, embed: Tensor, norm: Tensor, qkv: Tensor, rotary: Tensor, at: Tensor) -> Any:
            hidden = nn.functional.embedding(ids, embed)
            normed, residual = rms_norm(hidden, torch.zeros_like(hidden), norm, config.eps)
            return *project_qkv(config, normed, qkv, rotary, at), residual

        def finish_layer(residual: Tensor, attended: Tensor, weights: Sequence[Tensor], norm: Tensor) -> Any:
            o, post_norm, gate_up, down = weights
            normed, residual = rms_norm(nn.functional.linear(attended, o), residual, post_norm, config.eps)
            return rms_norm(gated_mlp(normed, gate_up, down), residual, norm, config.eps)

        def middle(
            residual: Tensor,
            attended: Tensor,
            weights: Sequence[Tensor],
            norm: Tensor,
            qkv: Tensor,
            rotary: Tensor,
            at: Tensor,
        ) -> Any:
            normed, residual = finish_layer(residual, attended, weights, norm)
            return *project_qkv(config, normed, qkv, rotary, at), residual

        def last(residual: Tensor, attended: Tensor, weights: Sequence[Tensor], norm: Tensor) -> Any:
            return finish_layer(residual, attended, weights, norm)[0]

        compiled = functools.partial(torch.compile, fullgraph=True, dynamic=dynamic)
        self.first, self.middle, self.last = compiled(first), compiled(middle), compiled(last)


def weights_after_attention(layer: DecoderLayer) -> list[Tensor]:
    """o, post_norm, gate_up and down of a layer."""
    return [layer.o.weight, layer.post_norm.weight, layer.gate_up.weight, layer.down.weight]


class PiecewiseLoop:
    """num_layers + 1 graph replays with the attention op called live between them, as a flat list of calls.

    The compiled pieces and their inputs can be run without graphs too (``run_compiled``), which is how they warm up.
    """

    def __init__(self, model: Decoder, inputs: Sequence[Tensor], compiled: CompiledPieces | None = None) -> None:
        self.static_inputs = [tensor.clone() for tensor in inputs]
        self.layers = model.decoder_layers()
        num_tokens, attended_size = inputs[0].shape[0], model.config.num_heads * model.config.head_dim
        # The steps run in order, so one buffer takes the result of every attention.
        self.attended = torch.empty(num_tokens, attended_size, dtype=model.rotary.dtype, device=inputs[0].device)
        self.pieces = self._bind(model, compiled or CompiledPieces(model.config))
        self._replays: list[Callable[[], None]] = []
        self._attention_inputs: list[tuple[Tensor, ...]] = []
        self._output: Tensor | None = None

    def _bind(self, model: Decoder, compiled: CompiledPieces) -> list[Callable[[Any], Any]]:
        """The num_layers + 1 pieces with everything bound but the residual."""
        ids, positions, _ = self.static_inputs
        bind = functools.partial
        norms = [layer.input_norm.weight for layer in self.layers] + [model.final_norm.weight]
        rotary = {"rotary": model.rotary, "at": positions}
        qkv = [layer.qkv.weight for layer in self.layers]
        pieces: list[Callable[[Any], Any]] = [
            bind(compiled.first, ids=ids, embed=model.embed.weight, norm=norms[0], qkv=qkv[0], **rotary)
        ]
        for index, layer in enumerate(self.layers):
            tail = {"attended": self.attended, "weights": weights_after_attention(layer), "norm": norms[index + 1]}
            if index + 1 < len(self.layers):
                pieces.append(bind(compiled.middle, **tail, qkv=qkv[index + 1], **rotary))
            else:
                pieces.append(bind(compiled.last, **tail))
        return pieces

    def _attention_of(self, layer: DecoderLayer, produced: Sequence[Tensor]) -> tuple[Tensor, ...]:
        q, k, v, _ = produced
        return q, k, v, layer.k_cache, layer.v_cache, self.static_inputs[2], self.attended

    def run_compiled(self, attention: Attention) -> Tensor:
        """One step of the compiled pieces on the static inputs, without graphs."""
        result = self.pieces[0](None)
        for layer, piece in zip(self.layers, self.pieces[1:], strict=True):
            attention(*self._attention_of(layer, result))
            result = piece(result[-1])
        assert isinstance(result, Tensor)
        return result

    def capture(self, attention: Attention, pool: Any = None) -> None:
        """Warm up and capture every piece on one side stream, into one pool: that of other loops, or a new one."""
        require_cuda(self.attended)
        stream, pool = harness.side_stream(), pool or torch.cuda.graph_pool_handle()
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles, and lets the libraries allocate their scratch outside the graphs' pool
                self.run_compiled(attention)
            torch.cuda.synchronize()
            residual: Tensor | None = None
            for index, piece in enumerate(self.pieces):
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    produced = piece(residual)
                finally:
                    graph.capture_end()
                self._replays.append(graph.replay)
                if index < len(self.layers):
                    self._attention_inputs.append(self._attention_of(self.layers[index], produced))
                    residual = produced[-1]
        torch.cuda.synchronize()
        self._output = produced

    def step(self, attention: Attention) -> Forward:
        """The loop as one function, with the live attention called through ``attention``."""
        plan: list[Callable[[], None]] = []
        for replay, arguments in zip(self._replays, self._attention_inputs, strict=False):
            plan += [replay, functools.partial(attention, *arguments)]
        plan.append(self._replays[-1])
        static_inputs, output = self.static_inputs, self._output
        assert output is not None, "capture() comes first"

        def step(*inputs: Tensor) -> Tensor:
            torch._foreach_copy_(static_inputs, inputs)
            for call in plan:
                call()
            return output

        return step
