"""Twins are equal whatever their names; everything that changes the code makes a difference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo import mark_dynamic
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from graphcap.compiler.canonical import canonical_symbols, canonical_text
from graphcap.compiler.eager_functions import eager
from tests.compiler.graphs import in_backend, pieces_of


@eager
def live(x: Tensor) -> Tensor:
    return x * 3


def texts(fn: Callable[..., Any], *inputs: Any, **options: Any) -> list[str]:
    """The canonical text of each piece of ``fn(*inputs)``."""
    (found,) = in_backend(
        lambda gm, _: [canonical_text(piece.module) for piece in pieces_of(gm)], fn, *inputs, **options
    )
    assert isinstance(found, list)
    return found


def text(fn: Callable[..., Any], *inputs: Any, **options: Any) -> str:
    (only,) = texts(fn, *inputs, **options)
    return only


def rows(*shape: int, low: int | None = None) -> Tensor:
    x = torch.randn(shape)
    mark_dynamic(x, 0, min=low, max=None if low is None else 1000)
    return x


X = torch.randn(4, 6)


class Block(nn.Module):
    def __init__(self, width: int = 6, slope: float = 0.5) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        return live(nn.functional.leaky_relu(self.fc(x), self.slope))


def on_device(name: str) -> str:
    """The canonical text of ``x + 1`` for an x on that device, which need not exist."""
    with FakeTensorMode():
        return canonical_text(make_fx(lambda x: x + 1)(torch.empty(2, device=name)))


def test_code_for_one_gpu_is_not_for_another() -> None:
    # Ranks with one cache directory: rank 0 loaded what rank 1 had compiled, and launched it on the wrong GPU.
    assert on_device("cuda:0") == on_device("cuda:0") != on_device("cuda:1")


@pytest.mark.parametrize("x", [X, rows(4, 6)], ids=["static", "dynamic"])
def test_layers_of_one_kind_are_twins(x: Tensor) -> None:
    found = texts(nn.Sequential(*(Block() for _ in range(4))), x)
    assert len(found) == 8
    # The first linear reads what the caller gave, the others read the piece before: it is the same to the code.
    assert len(set(found)) == 2


def test_models_that_differ_in_names_only_are_twins() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.projection = nn.Linear(6, 6)

        def forward(self, hidden: Tensor) -> Tensor:
            result = nn.functional.leaky_relu(self.projection(hidden), 0.5)
            return live(result)

    assert texts(Block(), X) == texts(Other(), X)


def test_symbol_names_do_not_matter() -> None:
    def f(a: Tensor) -> Tensor:
        return a * 2 + a.shape[0]

    def g(other: Tensor) -> Tensor:
        return other * 2 + other.shape[0]

    assert text(f, rows(4, 6)) == text(g, rows(9, 6))


def test_twins_agree_on_the_order_of_their_symbols() -> None:
    def f(a: Tensor, b: Tensor) -> Any:
        return live(a + 1), live(b + 1)

    def look(gm: fx.GraphModule, _: Any) -> list[tuple[str, list[Any]]]:
        return [(canonical_text(p.module), canonical_symbols(p.module)) for p in pieces_of(gm)]

    (found,) = in_backend(look, f, rows(4, 6), rows(5, 6))
    (first, (a,)), _, (second, (b,)), _ = found
    assert first == second
    assert a != b


DIFFERENT: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "constant": ((lambda x: x * 2, X), (lambda x: x * 3, X)),
    "type of a constant": ((lambda x: x * 1, X), (lambda x: x * 1.0, X)),
    "sign of zero": ((lambda x: x * 0.0, X), (lambda x: x * -0.0, X)),
    "operation": ((lambda x: x.sin(), X), (lambda x: x.cos(), X)),
    "order of arguments": ((lambda x: x.sin() - x, X), (lambda x: x - x.sin(), X)),
    "keyword": ((lambda x: x.sum(0), X), (lambda x: x.sum(0, keepdim=True), X)),
    "slice": ((lambda x: x[1:3] + 1, X), (lambda x: x[0:2] + 1, X)),
    "dtype": ((lambda x: x + 1, X), (lambda x: x + 1, X.double())),
    "shape": ((lambda x: x + 1, X), (lambda x: x + 1, torch.randn(4, 7))),
    "strides": ((lambda x: x + 1, X), (lambda x: x + 1, torch.randn(6, 4).t())),
    "offset": ((lambda x: x + 1, X), (lambda x: x + 1, torch.randn(5, 6)[1:])),
    "static or dynamic": ((lambda x: x + 1, X), (lambda x: x + 1, rows(4, 6))),
    "range of a size": ((lambda x: x + 1, rows(40, 6)), (lambda x: x + 1, rows(40, 6, low=32))),
    "outputs": ((lambda x: (x + 1, x + 2), X), (lambda x: (x + 2, x + 1), X)),
    "in place": ((lambda x: (x + 1).relu(), X), (lambda x: (x + 1).relu_(), X)),
    "requires_grad": ((lambda x: x + 1, X), (lambda x: x + 1, X.clone().requires_grad_())),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_differs_by(what: str) -> None:
    (f, *f_inputs), (g, *g_inputs) = DIFFERENT[what]
    assert text(f, *f_inputs) != text(g, *g_inputs)


def test_differs_by_how_sizes_relate() -> None:
    def f(a: Tensor, b: Tensor) -> Any:
        return a + 1, b + 1

    one_size = text(lambda a, b: (a + 1, b + 1, a + b), rows(4, 6), rows(4, 6))
    two_sizes = text(lambda a, b: (a + 1, b + 1, a + 1), rows(4, 6), rows(5, 6))
    assert one_size.count("z1") == 0
    assert two_sizes.count("z1") > 0
    assert text(f, rows(4, 6), rows(4, 6)) == text(f, rows(4, 6), rows(5, 6))


def test_differs_by_aliasing_of_inputs() -> None:
    def aliased(x: Tensor) -> Tensor:
        y = live(x + 1)
        return y[1:] + live(y)[:1]

    def look(gm: fx.GraphModule, _: Any) -> str:
        return canonical_text(pieces_of(gm)[-1].module)

    def views(x: Tensor) -> Any:
        a = x + 1
        b, c = a[:2], a[2:]
        live(x)
        return b * c

    def copies(x: Tensor) -> Any:
        a = x + 1
        b, c = a[:2], a.clone()[2:]
        live(x)
        return b * c

    (one,), (two,) = in_backend(look, views, X), in_backend(look, copies, X)
    assert one != two


def test_differs_by_a_guard_of_the_trace() -> None:
    """What the trace knows about a size, Inductor may build on: without it the code may be wrong."""

    def divisible(x: Tensor) -> Tensor:
        assert x.shape[0] % 8 == 0
        return x + 1

    assert text(divisible, rows(16, 6)) != text(lambda x: x + 1, rows(16, 6))


def test_differs_by_the_function_that_a_live_piece_calls() -> None:
    def make(by: int) -> Callable[[Tensor], Tensor]:
        @eager
        def scale(x: Tensor) -> Tensor:
            return x * by

        return scale

    two, three = make(2), make(3)
    assert len(set(texts(lambda x: two(x) + 1, X))) == 2
    assert texts(lambda x: two(x) + 1, X) == texts(lambda x: two(x) + 1, X)
    assert texts(lambda x: two(x) + 1, X) != texts(lambda x: three(x) + 1, X)


def test_differs_by_the_tensors_inside_a_wrapper_subclass() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    plain = text(lambda x: x + 1, X)
    same = text(lambda x: x + 1, TwoTensor(X, X))
    mixed = text(lambda x: x + 1, TwoTensor(X, X.clone()))
    assert plain != same
    assert plain != mixed


def test_an_attribute_counts_with_its_content() -> None:
    def module_with(constant: Tensor) -> fx.GraphModule:
        graph = fx.Graph()
        x = graph.placeholder("x")
        graph.output((graph.call_function(torch.add, (x, graph.get_attr("c"))),))
        return fx.GraphModule({"c": constant}, graph)

    one, same, other = torch.ones(3), torch.ones(3), torch.tensor([1.0, 1.0, 2.0])
    assert canonical_text(module_with(one)) == canonical_text(module_with(same))
    assert canonical_text(module_with(one)) != canonical_text(module_with(other))
    assert canonical_text(module_with(one)) != canonical_text(module_with(one.int()))
    assert canonical_text(module_with(torch.tensor(2.0))) != canonical_text(module_with(torch.tensor(3.0)))
