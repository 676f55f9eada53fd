"""Two sizes that a trace has found to be one: what it is told afterwards has one symbol for both."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import graphcap
from graphcap.compiler import nodes, private
from tests.compiler.graphs import in_backend
from tests.compiler.like_eager import assert_like_eager


def sum_of_zeros(x: Tensor, n: int, m: int) -> Tensor:
    return (x.new_zeros(n) + x.new_zeros(m)) * x


def test_a_size_has_the_symbol_that_is_left() -> None:
    def look(gm, _):
        sizes = [nodes.value_of(node) for node in gm.graph.nodes if node.op == "placeholder"]
        symbols = [size for size in sizes if isinstance(size, torch.SymInt)]
        return [(size.node._expr, private.without_replaced_symbols(size).node) for size in symbols]

    (found,) = in_backend(look, sum_of_zeros, torch.ones(1), 5, 5, dynamic=True)
    assert len({before for before, _ in found}) == 2, "the trace has made one symbol of them by itself"
    assert len({after._expr for _, after in found}) == 1
    assert [after.hint for _, after in found] == [5, 5]


@pytest.mark.parametrize("value", [3, 2.5, None, torch.ones(2)])
def test_what_is_no_size_stays(value: object) -> None:
    assert private.without_replaced_symbols(value) is value


@graphcap.eager
def live(x: Tensor) -> Tensor:
    return x * 2


def in_two_pieces(x: Tensor, n: int, m: int) -> Tensor:
    return live(x.new_zeros(n) + 1) + x.new_ones(m)


def test_a_piece_with_one_of_the_two_sizes() -> None:
    """A static cache of GPT-2 whose length is a size of the graph ended in a NameError on torch 2.11."""
    assert_like_eager(
        lambda: in_two_pieces,
        lambda call: (torch.ones(1), 4 + call % 3, 4 + call % 3),
        compiler="inductor",
        dynamic=True,
        calls=6,
        replayed=False,
    )
