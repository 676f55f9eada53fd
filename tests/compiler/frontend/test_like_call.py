"""Inputs like those of a call at other sizes: what is replaced, with what, and what stays the very same object."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from graphcap import GraphKey
from graphcap.compiler.frontend.call_dims import CallDims
from graphcap.compiler.frontend.like_call import LikeCall
from graphcap.config import Config
from graphcap.cudagraph import step
from graphcap.errors import StepError


def like(dims: dict[str, Any], *args: Any, said: step | None = None, **settings: Any) -> LikeCall:
    def function(a: Any, b: Any = None, c: Any = None) -> None: ...

    return LikeCall(CallDims.of(function, dims), Config(**settings), args, {}, said)


def at(num_tokens: int, num_reqs: int | None = None, **sizes: int) -> GraphKey:
    return GraphKey.of_sizes(sizes, num_tokens, num_reqs=num_reqs)


def test_declared_dims_follow_the_batch_and_the_others_stay() -> None:
    call = like(
        {"a": {0: "num_tokens"}, "b": {0: "num_reqs+1"}, "c": {1: "blocks"}}, *(torch.ones(3, 5) for _ in "abc")
    )
    (a, b, c), _, _ = call.at(at(8, 4, blocks=7))
    assert (a.shape, b.shape, c.shape) == ((8, 5), (5, 5), (3, 7))
    assert not torch.cat([a.flatten(), b.flatten(), c.flatten()]).any()


def test_a_dim_whose_name_the_batch_does_not_have_stays() -> None:
    (a,), _, _ = like({"a": {0: "num_tokens", 1: "blocks"}}, torch.ones(3, 5)).at(at(8))
    assert a.shape == (8, 5)


def fill_with_sizes(tensor: Tensor, size: torch.Size) -> None:
    tensor.fill_(100 * len(size) + size[0])


@pytest.mark.parametrize(
    ("pad", "expected"),
    [({}, 0), ({"a": -1}, -1), ({"a": "edge"}, 7), ({"a": fill_with_sizes}, 100)],
)
def test_every_row_holds_the_declared_fill(pad: dict[str, Any], expected: int) -> None:
    (a,), _, _ = like({"a": 0}, torch.tensor([7, 8, 9]), pad=pad).at(at(5))
    assert a.tolist() == [expected] * 5


def test_a_tensor_that_is_given_twice_is_one_tensor() -> None:
    x = torch.ones(3)
    (a, b, c), _, _ = like({"a": 0, "b": 0}, x, x, torch.ones(3)).at(at(5))
    assert a is b
    assert c.shape == (3,)


def test_layout_and_kind_are_kept() -> None:
    with torch.inference_mode():
        x = torch.ones(4, 3).t()
    (a,), _, _ = like({"a": 1}, x).at(at(6))
    assert (a.shape, a.stride(), a.is_inference()) == ((3, 6), (1, 3), True)
    (a,), _, _ = like({"a": 0}, torch.ones(3, 2)).at(at(6))
    assert not a.is_inference()


Pair = namedtuple("Pair", ["ids", "other"])


@dataclass
class Batch:
    ids: Tensor
    other: Any


@pytest.mark.parametrize(
    "make",
    [
        Batch,
        Pair,
        lambda ids, other: {"ids": ids, "other": other},
        lambda ids, other: SimpleNamespace(ids=ids, other=other),
    ],
)
def test_nested_inputs_are_copied_around_what_is_replaced(make: Any) -> None:
    other = object()
    given = make(torch.ones(3), other)
    (a,), _, _ = like({"a": {"ids": 0}}, given).at(at(5))
    read = (lambda value, name: value[name]) if isinstance(given, dict) else getattr
    assert type(a) is type(given)
    assert read(a, "ids").tolist() == [0] * 5
    assert read(a, "other") is other
    assert read(given, "ids").tolist() == [1] * 3


def test_what_has_nothing_declared_is_the_very_same_object() -> None:
    caches, config = [torch.ones(9), torch.ones(9)], SimpleNamespace(table=torch.ones(2))
    call = like({"a": 0}, torch.ones(3), caches, config)
    (_, b, c), _, _ = call.at(at(5))
    assert b is caches
    assert c is config
    assert {id(each) for each in call.lent} == {id(each) for each in caches}


def test_inputs_and_tags_of_the_step() -> None:
    said = step(num_tokens=3, tags={"lora": 1}, inputs={"lens": torch.ones(2), "prompts": []})
    call = like({"a": 0, "step.lens": {0: "num_reqs"}}, torch.ones(3), said=said, pad={"step.lens": -1})
    _, _, inputs = call.at(at(8, 4))
    assert inputs["lens"].tolist() == [-1] * 4
    assert inputs["prompts"] is said.inputs.given["prompts"]
    assert call.tags == (("lora", 1),)


def test_what_cannot_be_resized_is_refused() -> None:
    with pytest.raises(StepError, match="a is a static argument"):
        like({"a": 0}, torch.ones(3), static_args=["a"]).at(at(5))
    with pytest.raises(StepError, match="a is a Parameter"):
        like({"a": 0}, torch.nn.Parameter(torch.ones(3))).at(at(5))
