"""Live operators that write their result where graphs read it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import graphcap
from graphcap.compiler.out_variants import out_function

CALLS: list[str] = []


@pytest.fixture(autouse=True, scope="module")
def library() -> Iterator[None]:
    """``scaled`` has an out overload, ``other`` has one of other arguments, ``picked`` one of unknown size."""
    made = torch.library.Library("out_tests", "FRAGMENT")
    made.define("scaled(Tensor x, float by=2.0) -> Tensor")
    made.define("scaled.out(Tensor x, float by=2.0, *, Tensor(a!) out) -> Tensor(a!)")
    made.define("other(Tensor x) -> Tensor")
    made.define("other.out(Tensor x, int more, *, Tensor(a!) out) -> Tensor(a!)")
    made.define("picked(Tensor x) -> Tensor", tags=[torch.Tag.dynamic_output_shape])
    made.define("picked.out(Tensor x, *, Tensor(a!) out) -> Tensor(a!)")

    def scaled(x: Tensor, by: float = 2.0) -> Tensor:
        CALLS.append("scaled")
        return x * by

    def scaled_out(x: Tensor, by: float = 2.0, *, out: Tensor) -> Tensor:
        CALLS.append("scaled.out")
        return torch.mul(x, by, out=out)

    made.impl("scaled", scaled, "CompositeExplicitAutograd")
    made.impl("scaled.out", scaled_out, "CompositeExplicitAutograd")
    made.impl("other", torch.clone, "CompositeExplicitAutograd")
    torch.library.register_fake("out_tests::scaled", lambda x, by=2.0: torch.empty_like(x), lib=made)
    torch.library.register_fake("out_tests::other", torch.empty_like, lib=made)
    yield
    made._destroy()


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    CALLS.clear()
    with torch.no_grad():
        yield


def piece_of(function: Callable[..., Any], *args: Tensor) -> torch.fx.GraphModule:
    piece = make_fx(lambda *args: (function(*args),), tracing_mode="fake")(*args)
    for node in piece.graph.nodes:
        node.meta.setdefault("example_value", node.meta.get("val"))
    return piece


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.ops.aten.mm.default(x, x),
        lambda x: torch.ops.aten._softmax.default(x, -1, False),
        lambda x: torch.ops.out_tests.scaled.default(x=x),
        lambda x: torch.ops.out_tests.scaled(x, 3.0),
    ],
)
def test_the_result_is_written_into_the_tensor(function: Callable[..., Any]) -> None:
    x = torch.randn(3, 3)
    into = out_function(piece_of(function, x))
    assert into is not None
    out = torch.full((3, 3), torch.nan)
    into(out, x)
    torch.testing.assert_close(out, function(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.ops.out_tests.other(x=x),
        lambda x: torch.ops.out_tests.picked(x=x),
        lambda x: torch.ops.aten.view.default(x, [9]),
        lambda x: torch.ops.aten.add_.Tensor(x, 1),
        lambda x: torch.ops.aten.mm.default(x + 1, x),
        lambda x: torch.ops.aten.max.dim(x, 0)[0],
        lambda x: torch.ops.aten.mm.out(x, x, out=x),
        lambda x: torch.relu(x) + 0,
    ],
)
def test_what_has_none(function: Callable[..., Any]) -> None:
    piece = torch.fx.symbolic_trace(lambda x: (function(x),))
    assert out_function(piece) is None


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.ops.out_tests.scaled(self.first(x), 0.5))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_replay_calls_the_out_overload(device: str) -> None:
    model: Any = Attends().to(device)
    compiled = graphcap.compile(
        model, compiler="eager", simulate=device == "cpu", cudagraph_mode="PIECEWISE",
        splitting_ops=["out_tests::scaled"], dynamic_arg_dims={"x": {0: "num_tokens"}}, capture_sizes=[2, 4],
    )  # fmt: skip
    for n in (4, 4, 2, 3, 4, 1):
        x = torch.randn(n, 4, device=device)
        with graphcap.disabled():
            expected = model(x)
        torch.testing.assert_close(compiled(x), expected)
    CALLS.clear()
    for n in (4, 2):
        compiled(torch.randn(n, 4, device=device))
    assert CALLS == ["scaled.out", "scaled.out"]
