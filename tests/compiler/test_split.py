"""The split graph as text, and the law: pieces that run one after the other are the original."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch._dynamo import mark_dynamic

from graphcap.compiler.eager_functions import eager
from tests.compiler.graphs import in_backend, piece_text, pieces_of, stitched
from tests.compiler.random_programs import OPERATIONS, Operation, random_program

GOLDEN = Path(__file__).parent / "golden"
ACCEPT = os.environ.get("GRAPHCAP_ACCEPT") == "1"  # read here: tests do not see the developer's GRAPHCAP_*


@eager
def live(x: Tensor) -> Tensor:
    return x * 3


@eager
def pair(x: Tensor) -> tuple[Tensor, Tensor]:
    return x * 3, x + 1


def dynamic(*shape: int) -> Tensor:
    x = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    mark_dynamic(x, 0)
    return x


def attention_block(x: Tensor, w: Tensor) -> Tensor:
    q = F.linear(x, w).unsqueeze(0)
    return F.linear(F.scaled_dot_product_attention(q, q, q).squeeze(0), w) + x


def autocast_around_a_cut(x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = live(x @ x.t()) @ x
    return y.float() + 1


def tuple_across_a_cut(x: Tensor) -> Tensor:
    a, b = pair(x + 1)
    return a * b


def size_in_the_middle(x: Tensor) -> Tensor:
    y = live(x * 2)
    return y.reshape(x.shape[0] * 2, -1) + x.shape[0]


def in_place_across_a_cut(x: Tensor) -> Tensor:
    y = x + 1
    z = live(y)
    y.add_(z)
    return live(y) + z


def growing_cache(q: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
    cache = torch.cat([cache, q])
    return (q * 2) @ cache.t() @ cache + 1, cache


CASES: dict[str, tuple[Callable[..., Any], Callable[[], tuple[Tensor, ...]]]] = {
    "attention_block": (attention_block, lambda: (torch.ones(4, 8), torch.ones(8, 8))),
    "attention_block_dynamic": (attention_block, lambda: (dynamic(4, 8), torch.ones(8, 8))),
    "autocast_around_a_cut": (autocast_around_a_cut, lambda: (torch.ones(4, 4),)),
    "tuple_across_a_cut": (tuple_across_a_cut, lambda: (torch.ones(4, 8),)),
    "size_in_the_middle": (size_in_the_middle, lambda: (dynamic(4, 6),)),
    "in_place_across_a_cut": (in_place_across_a_cut, lambda: (torch.ones(4, 6),)),
    "growing_cache": (growing_cache, lambda: (torch.ones(2, 4), dynamic(5, 4))),
}


@pytest.mark.parametrize("name", CASES)
def test_split_graph_is_as_before(name: str) -> None:
    """``GRAPHCAP_ACCEPT=1`` writes the files anew; read the diff."""
    fn, inputs = CASES[name]
    (text,) = in_backend(lambda gm, _: "\n\n".join(map(piece_text, pieces_of(gm))) + "\n", fn, *inputs())
    golden = GOLDEN / f"{name}.txt"
    if ACCEPT:
        golden.write_text(text)
    assert text == golden.read_text()


@pytest.mark.parametrize("name", CASES)
def test_split_then_stitch_is_the_original(name: str) -> None:
    fn, inputs = CASES[name]
    ((program, _),) = in_backend(stitched_copy, fn, *inputs())
    placeholders = program_arguments(fn, inputs)
    for got, expected in zip(program.run(*placeholders), flat(fn(*inputs())), strict=True):
        assert torch.equal(got, expected)


def stitched_copy(gm: fx.GraphModule, example_inputs: Any) -> Any:
    return stitched(gm, example_inputs)


def program_arguments(fn: Any, inputs: Any) -> list[Any]:
    """What Dynamo passes to the graph of ``fn(*inputs())``."""
    got: list[Any] = []

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        def run(*args: Any) -> Any:
            got.extend(args)
            return gm.forward(*(a.clone() if isinstance(a, Tensor) else a for a in args))

        return run

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(fn, backend=backend)(*inputs())
    return got


def flat(value: Any) -> list[Any]:
    return list(value) if isinstance(value, tuple) else [value]


def test_a_piece_takes_tensors_first_and_sizes_last() -> None:
    (pieces,) = in_backend(lambda gm, _: pieces_of(gm), size_in_the_middle, dynamic(4, 6))
    for piece in pieces:
        tensors = [isinstance(n.meta["example_value"], Tensor) for n in piece.inputs]
        assert tensors == sorted(tensors, reverse=True)


def test_a_piece_tells_the_module_and_the_line_it_came_from() -> None:
    class Block(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return live(x + 1)

    (pieces,) = in_backend(lambda gm, _: pieces_of(gm), torch.nn.Sequential(Block(), Block()), torch.ones(2))
    assert [p.module_path.rpartition(".")[2] for p in pieces] == ["0", "0", "1", "1"]
    assert all(p.source.startswith(__file__) for p in pieces)


@given(operations=OPERATIONS, cuts=st.sets(st.integers(0, 20)), seed=st.integers(0, 9))
@hypothesis_settings(max_examples=25)
def test_split_then_stitch_is_the_original_on_random_programs(
    operations: list[Operation], cuts: set[int], seed: int
) -> None:
    program = random_program(operations)
    torch.manual_seed(seed)
    x, y = torch.randn(4, 4), torch.randn(4, 4)

    def cut(node: fx.Node) -> bool:
        return list(node.graph.nodes).index(node) in cuts

    def split_and_run(gm: fx.GraphModule, example_inputs: Any) -> Any:
        return stitched(gm, example_inputs, rules=[cut])[0].run

    results = []
    for run in (program, compiled_by(program, split_and_run)):
        given_x, given_y = x.clone(), y.clone()
        with torch.no_grad():
            out = run(given_x, given_y)
        results.append((*out, given_x, given_y))
    eager_run, split_run = results
    for index, (expected, got) in enumerate(zip(eager_run, split_run, strict=True)):
        torch.testing.assert_close(
            got, expected, rtol=0, atol=0, equal_nan=True, msg=lambda m, i=index: f"value {i}: {m}"
        )
        assert expected.stride() == got.stride()
    assert aliasing(eager_run) == aliasing(split_run)


def compiled_by(fn: Callable[..., Any], backend: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(fn, backend=backend, dynamic=False)


def aliasing(tensors: tuple[Tensor, ...]) -> list[int]:
    """For each tensor the index of the first one with the same storage."""
    storages = [t.untyped_storage().data_ptr() for t in tensors]
    return [storages.index(s) for s in storages]
