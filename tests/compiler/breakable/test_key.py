"""Tensors of another class or with another sign are other arguments, and other parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcap
from graphcap.compiler.breakable.key import arguments_of
from graphcap.compiler.breakable.sizes import CallSizes
from graphcap.cudagraph import Size
from tests.compiler.breakable.like_original import CALLS, breakable, num_replays, rows


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


class Marked(Tensor):
    """Nothing but another class."""


class Shifted(Tensor):
    """A linear layer of such a tensor gives one more."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        return result + 1 if func is nn.functional.linear else result


OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "of another class": lambda x: x.as_subclass(Marked),
    "with functions of its own": lambda x: x.as_subclass(Shifted),
    "negated": torch._neg_view,
    "conjugated": torch.conj,
}


def key_of(x: Tensor, dims: dict[int, Size] | None) -> object:
    sizes = CallSizes() if dims is None else CallSizes({"n": 3}, {id(x): dims})
    return arguments_of((x,), {}, {}, sizes).key


@pytest.mark.parametrize("dims", [None, {0: Size("n")}])
@pytest.mark.parametrize("kind", list(OTHERS))
def test_the_key_knows_them(kind: str, dims: dict[int, Size] | None) -> None:
    x = torch.ones(3, 4, dtype=torch.complex64)
    assert key_of(x, dims) == key_of(x.clone(), dims)
    assert key_of(OTHERS[kind](x), dims) != key_of(x, dims)


@pytest.mark.parametrize("static", [(), ("input",)])
@pytest.mark.parametrize("kind", list(OTHERS))
def test_a_recording_of_plain_tensors_does_not_serve_others(kind: str, static: tuple[str, ...]) -> None:
    original = nn.Linear(4, 4, dtype=torch.complex64)
    model = breakable(nn.Linear(4, 4, dtype=torch.complex64), static_args=static)
    model.load_state_dict(original.state_dict())
    x = rows().to(torch.complex64) * (1 + 1j)
    for _ in range(CALLS):
        assert torch.equal(model(x), original(x))
    replays = num_replays(model)
    assert replays >= 2
    other = OTHERS[kind](x)
    for _ in range(CALLS):
        got, expected = model(other), original(other)
        assert type(got) is type(expected)
        assert torch.equal(got.as_subclass(Tensor), expected.as_subclass(Tensor))
        assert torch.equal(model(x), original(x))
    assert num_replays(model) == replays + CALLS
    assert len(graphcap.explain(model).regions) == 2


@pytest.mark.parametrize("kind", list(OTHERS))
def test_nor_other_parameters(kind: str) -> None:
    original = nn.Linear(4, 4, dtype=torch.complex64)
    model = breakable(nn.Linear(4, 4, dtype=torch.complex64))
    model.load_state_dict(original.state_dict())
    x = rows().to(torch.complex64)
    for _ in range(CALLS):
        model(x)
    weight = original.weight.detach() * 1j
    for each in (original, model):
        each.weight = nn.Parameter(OTHERS[kind](weight), requires_grad=False)
    for _ in range(CALLS):
        got, expected = model(x), original(x)
        assert type(got) is type(expected)
        assert torch.equal(got.as_subclass(Tensor), expected.as_subclass(Tensor))
