"""Which integer inputs of a graph may be given other values, and up to where."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import graphcap
from graphcap.compiler.value_bounds import plain_name, value_bounds
from graphcap.cudagraph import ANY
from tests.compiler.graphs import trace

TABLE, SMALL = torch.randn(32, 4), torch.randn(7, 4)
IDS, X = torch.tensor([3, 1, 2]), torch.randn(3, 4)


@graphcap.eager
def unknown(x: Tensor, ids: Tensor) -> Tensor:
    return x + ids[:, None]


def bounds(fn: Callable[..., Any], *inputs: Tensor) -> list[int | None]:
    """Of the integer inputs, in the order of the arguments."""
    graph = trace(fn, *inputs).graph
    found = value_bounds(graph)
    given = [(node, node.meta["example_value"]) for node in graph.nodes if node.op == "placeholder"]
    return [found.get(node) for node, value in given if isinstance(value, Tensor) and not value.is_floating_point()]


@pytest.mark.parametrize(
    "look_up",
    [
        lambda ids: F.embedding(ids, TABLE),
        lambda ids: TABLE[ids],
        lambda ids: TABLE.index_select(0, ids),
        lambda ids: torch.gather(TABLE.t(), 1, ids.view(1, 3).expand(4, 3)),
        lambda ids: torch.ops.aten.embedding(TABLE, ids.to(torch.int32)),
        lambda ids: F.embedding(ids.flip(0)[1:], TABLE),
        lambda ids: F.embedding(ids, TABLE).sum() + (ids == 3).float()[0],
    ],
)
def test_what_picks_rows_of_a_table_may_pick_any_of_them(look_up: Callable[[Tensor], Tensor]) -> None:
    assert bounds(look_up, IDS) == [32]


def test_the_smallest_table_counts() -> None:
    assert bounds(lambda ids: TABLE[ids] + SMALL[ids], IDS) == [7]


@pytest.mark.parametrize(
    "calculated",
    [
        lambda x, ids: x * ids[:, None],
        lambda x, ids: x + (ids - ids.min()).unsqueeze(1),
        lambda x, ids: torch.where((ids > 2)[:, None], x, 0),
        lambda x, ids: x * ids.to(torch.float32).cos()[:, None],
        lambda x, ids: TABLE[ids] + (torch.arange(3) <= ids)[:, None],  # not larger than what they are compared with
    ],
)
def test_what_is_only_calculated_with_may_be_anything(calculated: Callable[..., Tensor]) -> None:
    assert bounds(calculated, X, IDS) == [ANY]


@pytest.mark.parametrize(
    "meant",
    [
        lambda x, ids: unknown(x + 1, ids),
        lambda x, ids: unknown(x, ids + 1),
        lambda x, ids: TABLE[ids + 1],  # a place in the table that nobody has looked up
        lambda x, ids: x[ids - 1],
        lambda x, ids: x.index_copy(0, ids - 1, x),
        lambda x, ids: F.one_hot(ids, 8),
        lambda x, ids: torch.repeat_interleave(x, ids, output_size=6, dim=0),
        lambda x, ids: TABLE[ids.add_(1)],
    ],
)
def test_what_may_be_a_place_is_left_alone(meant: Callable[..., Tensor]) -> None:
    assert bounds(meant, X, IDS.clone()) == [None]


def test_a_table_whose_size_follows_the_call_is_none() -> None:
    def last_rows(x: Tensor, ids: Tensor) -> Tensor:
        return x[ids]

    x = torch.randn(5, 4)
    torch._dynamo.mark_dynamic(x, 0)
    assert bounds(last_rows, x, IDS) == [None]


def test_flags_are_calculated_with() -> None:
    flags = torch.tensor([True, False, True])
    assert bounds(lambda x, flags: torch.where(flags.all(), x, -x), X, flags) == [ANY]


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("aten::add", "add"),
        ("_operator.add", "add"),
        ("torch._VariableFunctionsClass.embedding", "embedding"),
        ("aten::__and__", "and"),
        ("aten::add_", "add_"),  # in place: another one
        ("mine::add", "mine::add"),
        ("package.module.add", ""),
    ],
)
def test_names_are_those_of_torch_alone(name: str, plain: str) -> None:
    assert plain_name(name) == plain
