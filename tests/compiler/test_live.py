"""Pieces as plain Python: custom ops called directly where that is equivalent, and code that lets its graph go."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from graphcap.compiler.live import direct, plain_function
from tests.compiler.graphs import pieces_of, trace

seen: list[str] = []


@torch.library.custom_op("graphcap_test_live::double", mutates_args=())
def double(x: Tensor) -> Tensor:
    seen.append("kernel")
    return x * 2


@double.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


OP = torch.ops.graphcap_test_live.double.default
X = torch.randn(3)


class Watch(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_kernel_is_called_without_the_dispatcher_where_nobody_looks() -> None:
    call = direct(OP, "cpu")
    seen.clear()
    with torch.no_grad():
        assert torch.equal(call(X), X * 2)
    assert call is not OP
    assert seen == ["kernel"]


@pytest.mark.parametrize(
    "context", [torch.enable_grad, Watch, torch.profiler.profile], ids=["grad", "mode", "profiler"]
)
def test_a_call_that_somebody_looks_at_goes_through_the_resolved_overload(context, monkeypatch) -> None:
    through = []

    class Overload:
        """The overload, but it says when it is called."""

        __name__ = "double.default"
        _schema = OP._schema

        def __call__(self, x: Tensor) -> Tensor:
            through.append(1)
            return OP(x)

    monkeypatch.setattr("graphcap.compiler.private.custom_op_kernel", lambda op, device: (double._init_fn, False))
    call = direct(Overload(), "cpu")
    with torch.no_grad():
        call(X)
        assert not through
        with context():
            assert torch.equal(call(X), X * 2)
    assert through == [1]


def test_what_is_no_custom_op_is_called_as_it_is() -> None:
    assert direct(torch.ops.aten.mm.default, "cpu") is torch.ops.aten.mm.default
    assert direct(torch.relu, "cpu") is torch.relu


def test_plain_code_does_the_same_and_lets_its_graph_go() -> None:
    (piece,) = pieces_of(trace(lambda x: torch.relu(x + 1) * 2, X))
    module, plain = weakref.ref(piece.module), plain_function(piece.module)
    assert plain is not None
    del piece
    gc.collect()
    assert module() is None
    assert torch.equal(plain(X)[0], torch.relu(X + 1) * 2)


def test_code_that_reads_an_attribute_of_its_module_is_not_plain() -> None:
    gm = torch.fx.symbolic_trace(nn.Linear(2, 2))
    assert plain_function(gm) is None
