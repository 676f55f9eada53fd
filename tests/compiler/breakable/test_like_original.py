"""Everything that a caller can see, against the function itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, nn

import graphcap
from tests.compiler.breakable.like_original import Mlp, assert_like_original, rows
from tests.compiler.like_eager import Arguments
from tests.compiler.random_programs import OPERATIONS, Operation, random_program


def both(call: int) -> tuple[Tensor, Tensor]:
    return rows(), rows()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_module_with_state(mode: Callable[[], Any]) -> None:
    (region,) = assert_like_original(lambda: Mlp().eval(), lambda i: (rows(),), grad_mode=lambda i: mode())
    assert [(piece.capture, piece.mutates) for piece in region.pieces] == [("always", ("calls",))]
    assert region.bindings["fc.weight"] == "static"


def writes_in_place(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x[1:].mul_(2)
    y.t()[0] += x[:, 0]
    return x.sum(), (y * 2).relu_()


def returns_views(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = x + y
    return x, x[1:], z, z[:, 0], z.view(-1), x.view(3, 4), x.detach(), z


def returns_twice(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = x @ y.t()
    return z, z, y, z.t()


def makes_tensors(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    scale = torch.tensor([1.0, 2.0, 3.0, 4.0])
    scale += x[0]  # the next call starts from the numbers again
    total = torch.zeros(4)
    total.add_(scale)
    return x * scale, torch.tensor(3.0), torch.arange(3), total, torch.full((2,), 7), y * torch.tensor(2.0)


def many_results(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    a, b = x.split(2, dim=1)
    values, indices = torch.sort(y, dim=-1)
    return a, b.contiguous(), values, indices, *torch.unbind(x), torch.cat([a, b], 1), *torch._foreach_add([x, y], 1.0)


def into_out(x: Tensor, y: Tensor) -> Tensor:
    result = torch.empty(3, 4)
    torch.add(x, y, out=result)
    return result


@pytest.mark.parametrize(
    "function", [writes_in_place, returns_views, returns_twice, makes_tensors, many_results, into_out]
)
def test_a_function(function: Callable[..., Any]) -> None:
    assert_like_original(lambda: function, both)


def test_nested_arguments_and_results() -> None:
    def function(batch: dict[str, Any], *rest: Tensor, bias: Tensor | None = None, scale: float = 1.0) -> Any:
        ids, (mask, name) = batch["ids"], batch["more"]
        out = ids * mask * scale
        return {
            "out": out if bias is None else out + bias,
            "rest": [each + 1 for each in rest],
            "name": name,
            "mask": mask,
        }

    def inputs(call: int) -> Arguments:
        return Arguments(({"ids": rows(), "more": (rows(), "n")}, rows(), rows()), {"bias": rows(), "scale": 0.5})

    (region,) = assert_like_original(lambda: function, inputs)
    assert set(region.bindings) == {"batch.ids", "batch.more.0", "args.1", "args.2", "bias"}


def test_arguments_that_are_one_object_or_share_memory() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        x.add_(1)
        return x * y

    def same(call: int) -> tuple[Tensor, ...]:
        x = rows()
        return x, x

    def overlapping(call: int) -> tuple[Tensor, ...]:
        x = torch.randn(4, 4)
        return x[:3], x[1:]

    assert_like_original(lambda: function, same)
    assert_like_original(lambda: function, overlapping, replayed=False)  # written, and at another place on every call


def test_attention_is_cut_out_and_live_in_piecewise() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        q, k, v = (t.view(1, 1, 3, 4) for t in (x, y, x * y))
        return F.scaled_dot_product_attention(q, k, v).relu()

    for mode, live in (("AUTO", []), ("PIECEWISE", ["piece_1"])):
        (region,) = assert_like_original(lambda: function, both, cudagraph_mode=mode)
        assert [piece.capture for piece in region.pieces] == ["always", "full", "always"]
        assert [list(plan.live) for plan in region.plans] == [live]


@pytest.fixture
def cudnn_attention() -> Iterator[None]:
    """On the CPU: the operator that bfloat16 attention runs as on a GPU. It returns the longest query and key, too."""

    def attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **scale: Any) -> tuple[Any, ...]:
        result, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        return result, sums, None, None, q.shape[2], k.shape[2], torch.empty(()), torch.empty(()), None

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_scaled_dot_product_cudnn_attention", attention, "CPU")
        yield


@pytest.mark.usefixtures("cudnn_attention")
def test_sizes_that_attention_returns_are_no_obstacle() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        q, k, v = (t.view(1, 1, 3, 4) for t in (x, y, x * y))
        return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, False)[0].relu()

    (region,) = assert_like_original(lambda: function, both)
    assert [piece.capture for piece in region.pieces] == ["always", "full", "always"]
    assert [list(plan.live) for plan in region.plans] == [[]]


def test_views_between_cut_operators_are_no_graph_of_their_own() -> None:
    @graphcap.eager
    def live(x: Tensor) -> Tensor:
        return x + 1

    def function(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        shape = (1, 1, 3, 4)
        z = F.scaled_dot_product_attention(x.view(shape), y.view(shape), y.view(shape)).view(3, 4)
        z = live(z).view(shape)
        return F.scaled_dot_product_attention(z, z, z)[0] * 2, z

    (region,) = assert_like_original(lambda: function, both)
    assert [(piece.capture, piece.num_nodes) for piece in region.pieces] == [
        ("full", 4), ("never", 1), ("full", 2), ("always", 2),
    ]  # fmt: skip
    assert [plan.num_segments for plan in region.plans] == [1]


def test_autocast() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.fc(x)
            with torch.autocast("cpu", enabled=False):
                return h.float() @ self.fc.weight

    assert_like_original(
        Model, lambda i: (rows(),), grad_mode=lambda i: torch.autocast("cpu", torch.bfloat16) and _no_grad_autocast()
    )


class _no_grad_autocast:
    def __enter__(self) -> None:
        self.modes = torch.no_grad(), torch.autocast("cpu", torch.bfloat16)
        for mode in self.modes:
            mode.__enter__()

    def __exit__(self, *exc: Any) -> None:
        for mode in reversed(self.modes):
            mode.__exit__(*exc)


def test_random_numbers_differ_between_replays_and_follow_the_seed() -> None:
    regions = assert_like_original(lambda: Mlp().train(), lambda i: (torch.ones(3, 4),))
    assert regions[0].replays >= 2


@given(OPERATIONS)
@settings(max_examples=25)
def test_any_straight_program(operations: list[Operation]) -> None:
    program = random_program(operations)
    assert_like_original(lambda: program, lambda i: (torch.rand(4, 4), torch.rand(4, 4)), calls=6, replayed=False)


@given(OPERATIONS, OPERATIONS)
@settings(max_examples=15)
def test_any_program_around_a_live_function(before: list[Operation], after: list[Operation]) -> None:
    first, second = random_program(before), random_program(after)

    @graphcap.eager
    def live(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        y.mul_(0.5)
        return x + y, y

    def program(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        z = first(x, y)[-1]
        return (*second(*live(z, y)), z)

    assert_like_original(lambda: program, lambda i: (torch.rand(4, 4), torch.rand(4, 4)), calls=6, replayed=False)
