"""The form that a Dynamo graph is brought into before it is cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from graphcap.compiler import nodes
from graphcap.compiler.split import Piece
from tests.compiler.graphs import in_backend, pieces_of


def attend(q: Tensor) -> Tensor:
    q = q.reshape(2, 3, -1, 8)
    return F.scaled_dot_product_attention(q, q, q)


def reshaped(x: Tensor) -> Tensor:
    h = x.sin()
    size = h.size()
    return attend(h).reshape(size) + 1


def made_anew(x: Tensor) -> Tensor:
    size = x.sin().size()
    return attend(x).reshape(size) + x.new_ones(size) + x.expand(size)


def taken_apart(x: Tensor) -> tuple[Tensor, int]:
    size = (x + 1).size()
    return attend(x).reshape(size[0], size[1]), size[0] * 2


@pytest.mark.parametrize("fn", [reshaped, made_anew, taken_apart])
def test_no_size_crosses_a_cut_but_as_numbers(fn: Callable[[Tensor], Any]) -> None:
    """Inductor compiles no piece that returns a ``torch.Size``."""

    def look(gm: fx.GraphModule, _: Any) -> list[Piece]:
        return pieces_of(gm)

    x = torch.randn(12, 8)
    torch._dynamo.mark_dynamic(x, 0)
    (pieces,) = in_backend(look, fn, x)
    assert len(pieces) >= 3
    for piece in pieces:
        (output,) = piece.module.graph.find_nodes(op="output")
        crossing = [*piece.module.graph.find_nodes(op="placeholder"), *output.all_input_nodes]
        assert not [node for node in crossing if isinstance(nodes.value_of(node), torch.Size)]


@pytest.mark.parametrize("fn", [reshaped, made_anew, taken_apart])
def test_the_result_stays(fn: Callable[[Tensor], Any]) -> None:
    torch._dynamo.reset()
    run = torch.compile(fn, backend="graphcap", dynamic=True, options={"compiler": "eager"})
    with torch.no_grad():
        for num_rows in (12, 18):
            x = torch.randn(num_rows, 8)
            torch.testing.assert_close(run(x), fn(x), rtol=0, atol=0)
