from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._functorch.aot_autograd import aot_export_module
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses import FakeTensorMode

from graphcap.passes.add_rms_norm import OP, AddRmsNorm
from tests.passes.conftest import Rewrite

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
Outputs = tuple[torch.Tensor, ...]


def on_cpu() -> AddRmsNorm:
    """Rewrites CPU graphs too, with the op's plain PyTorch implementation."""
    return AddRmsNorm(rewrite_on=("cuda", "cpu"))


def batch(dtype: torch.dtype, *shape: int) -> Outputs:
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    return x, residual, torch.randn(shape[-1], generator=generator).to(dtype)


def normed(wide: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)


def llama(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Outputs:
    new = residual + x
    return weight * normed(new.to(torch.float32)).to(x.dtype), new


def llama_swapped(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Outputs:
    new = x + residual
    wide = new.float()
    return (torch.rsqrt((wide * wide).mean(-1, keepdim=True) + 3e-5) * wide).to(x.dtype) * weight, new


def rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Outputs:
    new = residual + x
    return torch.nn.functional.rms_norm(new, weight.shape, weight, 1e-5), new


def rms_norm_swapped(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Outputs:
    new = x + residual
    return (weight.float() * normed(new.float(), 0.25)).to(x.dtype), new


@pytest.mark.parametrize("spelling", [llama, llama_swapped, rms_norm, rms_norm_swapped])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 8), (2, 3, 8)], ids=["rank2", "rank3"])
def test_every_spelling_is_fused_and_computes_the_same(
    rewrite: Rewrite, spelling: Callable[..., Outputs], dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    inputs = batch(dtype, *shape)
    after = rewrite(on_cpu(), spelling, *inputs)
    assert (after.result.matches, after.result.replaced) == (1, 1)
    assert after.count(OP) == 1
    # Three inputs, the op, its two results, the output: nothing of the old chain is left.
    assert len(after.graph.nodes) == 7 < after.num_nodes_before
    expected_normed, expected_new = spelling(*inputs)
    assert torch.equal(after.outputs[1], expected_new)
    torch.testing.assert_close(after.outputs[0], expected_normed)


@pytest.mark.parametrize("spelling", [llama, rms_norm])
def test_residual_that_nobody_reads(rewrite: Rewrite, spelling: Callable[..., Outputs]) -> None:
    inputs = batch(torch.bfloat16, 3, 8)
    after = rewrite(on_cpu(), lambda *args: spelling(*args)[0], *inputs)
    assert after.result.replaced == 1
    assert len(after.graph.nodes) == 6
    torch.testing.assert_close(after.outputs, spelling(*inputs)[0])


def test_residual_stream_through_two_layers(rewrite: Rewrite) -> None:
    """The residual of the second match is a result of the first rewrite."""

    def layers(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Outputs:
        out, residual = llama(x, residual, weight)
        return rms_norm(out.sin(), residual, weight)

    inputs = batch(torch.bfloat16, 4, 16)
    after = rewrite(on_cpu(), layers, *inputs)
    assert (after.result.matches, after.count(OP)) == (2, 2)
    for output, expected in zip(after.outputs, layers(*inputs), strict=True):
        torch.testing.assert_close(output, expected)


def test_symbolic_rows(rewrite: Rewrite) -> None:
    inputs = batch(torch.bfloat16, 5, 3, 8)
    for tensor, dim in itertools.product(inputs[:2], (0, 1)):
        torch._dynamo.mark_dynamic(tensor, dim)
    after = rewrite(on_cpu(), llama, *inputs)
    assert after.result.replaced == 1
    assert torch.equal(after.outputs[0], llama(*inputs)[0])


def test_fp32_weight_of_a_low_precision_row(rewrite: Rewrite) -> None:
    """Multiplied in fp32 and then rounded, an fp32 weight is what the op's fp32 flag means."""
    x, residual, weight = batch(torch.bfloat16, 3, 8)

    def spelling(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return (normed((residual + x).float()) * weight).to(x.dtype)

    after = rewrite(on_cpu(), spelling, x, residual, weight.float())
    assert after.result.replaced == 1
    torch.testing.assert_close(after.outputs, spelling(x, residual, weight.float()))


def _gemma(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
    return (normed((r + x).float()) * (1.0 + w.float())).to(x.dtype)


def _llama_with_fp32_weight(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
    return w.float() * normed((r + x).float()).to(x.dtype)  # promotes: the result is fp32


def _layer_norm(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
    return nn.functional.layer_norm(r + x, w.shape, w)


def _centred(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
    wide = (r + x).float()
    variance = (wide - wide.mean(-1, keepdim=True)).pow(2).mean(-1, keepdim=True)
    return w * (wide * torch.rsqrt(variance + 1e-6)).to(x.dtype)


def _other_dim(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
    wide = (r + x).float()
    return w * (wide * torch.rsqrt(wide.pow(2).mean(0, keepdim=True) + 1e-6)).to(x.dtype)


def _all_dims(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
    wide = (r + x).float()
    return w * (wide * torch.rsqrt(wide.pow(2).mean((0, 1), keepdim=True) + 1e-6)).to(x.dtype)


def _cube(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
    wide = (r + x).float()
    return w * (wide * torch.rsqrt(wide.pow(3).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def _other_factor(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
    wide = (r + x).float()
    return w * (x.float() * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def _scaled_add(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
    return w * normed(torch.add(r, x, alpha=2).float()).to(x.dtype)


def _broadcast_add(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
    return w * normed((r + x[0]).float()).to(x.dtype)


def _no_add(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
    return w * normed((x * r).float()).to(x.dtype)


def _no_weight(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
    return normed((r + x).float()).to(x.dtype)


def _weight_per_element(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
    return r * normed((r + x).float()).to(x.dtype)


def _normed_row_used_twice(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
    row = normed((r + x).float()).to(x.dtype)
    return w * row, row


def _scale_used_twice(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
    wide = (r + x).float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return w * (wide * scale).to(x.dtype), scale


def _result_in_fp32(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
    return normed((r + x).float()) * w


WRONG = [
    _gemma,
    _llama_with_fp32_weight,
    _layer_norm,
    _centred,
    _other_dim,
    _all_dims,
    _cube,
    _other_factor,
    _scaled_add,
    _broadcast_add,
    _no_add,
    _no_weight,
    _weight_per_element,
    _normed_row_used_twice,
    _scale_used_twice,
    _result_in_fp32,
]


@pytest.mark.parametrize("spelling", WRONG, ids=lambda fn: fn.__name__)
def test_what_is_another_computation_does_not_match(rewrite: Rewrite, spelling: Callable[..., Any]) -> None:
    after = rewrite(on_cpu(), spelling, *batch(torch.bfloat16, 8, 8))
    assert (after.result.matches, after.result.replaced, after.result.sites) == (0, 0, ())
    assert len(after.graph.nodes) == after.num_nodes_before


def test_without_a_kernel_the_match_is_reported_and_left(rewrite: Rewrite) -> None:
    after = rewrite(AddRmsNorm(), llama, *batch(torch.float32, 3, 8))
    assert (after.result.matches, after.result.replaced) == (1, 0)
    assert len(after.graph.nodes) == after.num_nodes_before
    assert after.result.sites[0].endswith("left as it was: no kernel of ours on cpu")


def test_strided_input_is_reported_and_left(rewrite: Rewrite) -> None:
    x, residual, weight = batch(torch.bfloat16, 8, 8)
    after = rewrite(on_cpu(), llama, x.t(), residual, weight)
    assert (after.result.matches, after.result.replaced) == (1, 0)
    assert "x is not contiguous" in after.result.sites[0]


def test_row_wider_than_the_kernel_is_reported_and_left(rewrite: Rewrite) -> None:
    after = rewrite(on_cpu(), llama, *batch(torch.bfloat16, 1, 16385))
    assert (after.result.matches, after.result.replaced) == (1, 0)
    assert "hidden size 16385" in after.result.sites[0]


class FunctionalRmsNorm(nn.Module):
    def forward(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Outputs:
        return rms_norm(x, residual, weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_graphs_are_rewritten_by_default(dtype: torch.dtype) -> None:
    """On fake CUDA tensors: torch takes another way to decompose ``F.rms_norm`` there than on a CPU."""
    with FakeTensorMode(), torch.no_grad():
        inputs = [torch.empty(shape, dtype=dtype, device="cuda") for shape in ((2, 4, 8), (2, 4, 8), (8,))]
        traced: Any
        traced, _ = aot_export_module(
            FunctionalRmsNorm(), inputs, trace_joint=False, decompositions=select_decomp_table()
        )
    a_pass = AddRmsNorm()
    a_pass.triton = True
    assert a_pass(traced.graph).replaced == 1
    traced.graph.lint()
    a_pass.triton = False
    assert not a_pass.applies_to(torch.device("cuda"))


class Norm(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * normed(x.float()).to(x.dtype)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Norm(8), nn.RMSNorm(8)])

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> Any:
        residual = residual + x
        return self.layers[1](residual + self.layers[0](residual))


def test_sites_name_source_line_and_module(rewrite: Rewrite) -> None:
    x, residual, _ = batch(torch.float32, 3, 8)
    hand_written, builtin = rewrite(AddRmsNorm(), Layers(), x, residual).result.sites
    assert hand_written.startswith(f"{__file__}:")
    assert "(layers.0)" in hand_written
    # Of torch.nn.RMSNorm no line is the user's, except for the one that calls it.
    assert builtin.startswith(f"{__file__}:")
    assert "(layers.1)" in builtin
