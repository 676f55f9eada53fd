"""Boolean masks of attention become additive where they are made, once for all layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from graphcap.compiler import nodes, private
from graphcap.compiler.attention_masks import make_masks_additive
from graphcap.compiler.backend import graphcap
from tests.compiler.graphs import call_nodes, trace
from tests.compiler.like_eager import assert_like_eager

ROWS, WIDTH = 6, 8


def attention(x: Tensor, mask: Tensor | None) -> Tensor:
    """One head over [batch, ROWS, WIDTH]."""
    heads = x.unsqueeze(1)
    return F.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask).squeeze(1)


def additive(function: Callable[..., Any], *inputs: Any) -> tuple[fx.GraphModule, list[fx.Node]]:
    """The graph with additive masks, and the nodes that make them; it computes what the function computes."""
    gm = trace(function, *inputs)
    make_masks_additive(gm.graph)
    gm.graph.lint()
    gm.recompile()
    return gm, call_nodes(gm, "where")


def masks_of(gm: fx.GraphModule) -> list[torch.dtype]:
    values = [nodes.value_of(node.kwargs["attn_mask"]) for node in call_nodes(gm, "scaled_dot")]
    return [value.dtype for value in values]


class Layers(nn.Module):
    """A mask that all layers share, made in the graph, as in Hugging Face's models."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, dtype=dtype) for _ in range(3))

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        causal = torch.ones(ROWS, ROWS, dtype=torch.bool, device=x.device).tril()
        mask = (causal & kept.unsqueeze(1)).unsqueeze(1).expand(-1, 1, -1, -1)
        for layer in self.layers:
            x = x + attention(layer(x), mask)
        return x


def layers_inputs(call: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    kept = torch.rand(2, ROWS) > 0.3
    kept[0] = call % 2 == 0  # a row of nothing, or of everything
    return torch.randn(2, ROWS, WIDTH, dtype=dtype), kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_mask_for_all_layers(dtype: torch.dtype) -> None:
    gm, made = additive(Layers(dtype), *layers_inputs(0, dtype))
    assert len(made) == 1
    assert masks_of(gm) == [dtype] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["FULL", "PIECEWISE"])
def test_to_the_bit_what_eager_computes(mode: str, dtype: torch.dtype) -> None:
    assert_like_eager(lambda: Layers(dtype), lambda call: layers_inputs(call, dtype), cudagraph_mode=mode)


def test_a_call_converts_once() -> None:
    model, x = Layers(), layers_inputs(0)
    compiled = torch.compile(model, backend=graphcap, options={"compiler": "eager", "simulate": True})

    def conversions(function: Callable[..., Any]) -> int:
        with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as watched:
            function(*x)
        return [event.name for event in watched.events()].count("aten::where")

    conversions(compiled)  # traces
    assert conversions(model) == 3 * conversions(compiled) > 0


def test_compiled_by_inductor() -> None:
    assert_like_eager(Layers, layers_inputs, compiler="inductor")


def test_dynamic_sizes() -> None:
    def grown(x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        return attention(x + 1, mask)

    assert_like_eager(
        lambda: grown,
        lambda call: (torch.randn(2, 4 + call % 2, WIDTH),),
        dynamic=True,
        calls=8,
    )


def test_a_mask_among_the_arguments() -> None:
    gm, made = additive(attention, torch.randn(2, ROWS, WIDTH), torch.rand(2, 1, ROWS, ROWS) > 0.3)
    assert len(made) == 1
    assert masks_of(gm) == [torch.float32]


def test_queries_of_two_dtypes_have_a_mask_each() -> None:
    def both(x: Tensor) -> Tensor:
        mask = torch.ones(ROWS, ROWS, dtype=torch.bool).tril()
        return attention(x, mask) + attention(x.double(), mask).float()

    gm, made = additive(both, torch.randn(2, ROWS, WIDTH))
    assert len(made) == 2
    assert masks_of(gm) == [torch.float32, torch.float64]


def add_to(mask: Tensor) -> None:
    mask.logical_or_(torch.ones_like(mask).triu())


def set_in(mask: Tensor) -> None:
    mask[0, 1] = True


def through_a_view(mask: Tensor) -> None:
    mask.view(-1).fill_(True)


def as_out(mask: Tensor) -> None:
    torch.logical_not(mask, out=mask)


@torch.library.custom_op("graphcap_tests::opens", mutates_args=("mask",))
def by_an_operator(mask: Tensor) -> None:
    mask.fill_(True)


@pytest.mark.parametrize("write", [add_to, set_in, through_a_view, as_out, by_an_operator])
def test_a_mask_that_is_written_between_two_layers_stays(write: Callable[[Tensor], None]) -> None:
    def function(x: Tensor) -> Tensor:
        mask = torch.ones(ROWS, ROWS, dtype=torch.bool).tril()
        x = attention(x, mask)
        write(mask)
        return attention(x, mask)

    gm, made = additive(function, torch.randn(2, ROWS, WIDTH))
    assert not made
    assert masks_of(gm) == [torch.bool] * 2
    assert_like_eager(lambda: function, lambda call: (torch.randn(2, ROWS, WIDTH),), replayed=False)


def test_a_mask_that_others_read_is_no_obstacle() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mask = torch.ones(ROWS, ROWS, dtype=torch.bool).tril()
        return attention(x, mask), mask.sum(), ~mask

    _, made = additive(function, torch.randn(2, ROWS, WIDTH))
    assert len(made) == 1
    assert_like_eager(lambda: function, lambda call: (torch.randn(2, ROWS, WIDTH),))


def test_what_has_no_boolean_mask_stays() -> None:
    def function(x: Tensor) -> Tensor:
        return attention(attention(x, torch.zeros(ROWS, ROWS)), None) + F.scaled_dot_product_attention(x, x, x)

    gm = trace(function, torch.randn(2, ROWS, WIDTH))
    before = str(gm.graph)
    make_masks_additive(gm.graph)
    assert str(gm.graph) == before


def test_positional_and_aten_spellings() -> None:
    def function(x: Tensor) -> Tensor:
        mask = torch.ones(ROWS, ROWS, dtype=torch.bool).tril()
        x = F.scaled_dot_product_attention(x, x, x, mask)
        return torch.ops.aten.scaled_dot_product_attention(x, x, x, mask)

    gm, made = additive(function, torch.randn(2, ROWS, WIDTH))
    assert len(made) == 1
    assert all(nodes.value_of(node.args[3]).dtype is torch.float32 for node in call_nodes(gm, "scaled_dot"))


def test_under_autocast() -> None:
    def function(x: Tensor) -> Tensor:
        mask = torch.ones(ROWS, ROWS, dtype=torch.bool).tril()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return attention(torch.matmul(x, x.transpose(-1, -2)) @ x, mask) + attention(x, mask)

    assert_like_eager(lambda: function, lambda call: (torch.randn(2, ROWS, WIDTH),))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, ROWS])
def test_cuda_attention_is_the_same_with_both_masks(rows: int) -> None:
    """Of every implementation that takes a mask, and of the one that torch chooses."""
    query = torch.randn(2, 4, rows, 64, device="cuda").bfloat16()
    keys = torch.randn(2, 4, 48, 64, device="cuda").bfloat16()
    mask = torch.rand(2, 1, rows, 48, device="cuda") > 0.3
    mask[0, :, 0] = False  # a row that sees nothing: its result depends on the implementation
    backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    for chosen in ([backends[0]], [backends[1]], [backends[2]], backends):
        with sdpa_kernel(chosen):
            expected = F.scaled_dot_product_attention(query, keys, keys, attn_mask=mask)
            with FakeTensorMode() as fake:
                args = [fake.from_tensor(each) for each in (query, keys, keys, mask)]
            forbidden = private.forbidden_score(args, {})
            assert forbidden is not None
            added = torch.where(mask, 0.0, forbidden).to(query.dtype)
            assert torch.equal(F.scaled_dot_product_attention(query, keys, keys, attn_mask=added), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["FULL", "PIECEWISE"])
def test_layers_on_cuda(mode: str) -> None:
    model = Layers(torch.bfloat16).cuda()
    compiled = torch.compile(model, backend=graphcap, options={"compiler": "eager", "cudagraph_mode": mode})
    with torch.no_grad():
        for call in range(6):
            x, kept = layers_inputs(call, torch.bfloat16)
            assert torch.equal(compiled(x.cuda(), kept.cuda()), model(x.cuda(), kept.cuda()))
