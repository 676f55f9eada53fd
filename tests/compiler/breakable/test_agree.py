"""When two recordings agree, and which arguments of a recording say where something is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import graphcap
from graphcap.compiler.breakable.agree import difference
from graphcap.compiler.breakable.record import Recorder, record
from graphcap.compiler.breakable.write_indices import write_indices


def recording_of(function: Callable[..., Any], *tensors: Tensor) -> Recorder:
    with torch.no_grad():
        return record(lambda: function(*tensors), tensors)[0]


def between(function: Callable[[Tensor], Any], one: int, other: int) -> str:
    first, second = (recording_of(function, torch.ones(n, 4)) for n in (one, other))
    return difference(first, second, same_size=one == other)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.view(x.shape[0], 2, 2).transpose(0, 1),
        lambda x: x[: x.shape[0] - 1] * 2,
        lambda x: torch.zeros(x.shape[0], 3) + x[:, :3],
        lambda x: x.split(x.shape[0]),
    ],
)
def test_sizes_are_no_difference_between_calls_of_two_sizes(function: Callable[[Tensor], Any]) -> None:
    assert not between(function, 3, 5)
    assert not between(function, 3, 3)
    again = [recording_of(function, torch.ones(n, 4)) for n in (3, 5)]
    assert difference(*again)  # at one size they would be one


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * x.shape[0],
        lambda x: x + torch.arange(x.shape[0])[:, None],
        lambda x: x * torch.tensor(float(x.shape[0])),
        lambda x: x.sum(0) if x.shape[0] > 4 else x.mean(0),
        lambda x: x.sum(0 if x.shape[0] > 4 else 1),
        lambda x: [x * 2] * x.shape[0],
    ],
)
def test_any_other_number_is(function: Callable[[Tensor], Any]) -> None:
    assert between(function, 3, 5)
    assert not between(function, 5, 5)


def test_a_tensor_from_outside_is_the_same_one() -> None:
    tables = [torch.ones(4), torch.ones(4)]
    recordings = [recording_of(lambda x: x + tables[0], torch.ones(n, 4)) for n in (3, 5)]
    other = recording_of(lambda x: x + tables[1], torch.ones(3, 4))
    assert not difference(*recordings, same_size=False)
    assert "another tensor" in difference(other, recordings[1], same_size=False)


@graphcap.eager
def writes(cache: Tensor, slots: Tensor, x: Tensor) -> None:
    cache[slots] = x


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda cache, slots, x: cache.index_copy_(0, slots, x), {1}),
        (lambda cache, slots, x: cache.__setitem__(slots + 1, x), {1}),
        (lambda cache, slots, x: cache.scatter_(0, torch.where(slots < 0, 0, slots)[:, None].expand(-1, 4), x), {1}),
        (writes, {1}),
        (lambda cache, slots, x: cache[slots] + x, set()),
        (lambda cache, slots, x: cache.add_(x.sum() * slots.sum()), set()),
    ],
)
def test_write_indices(function: Callable[..., Any], found: set[int]) -> None:
    recording = recording_of(function, torch.zeros(8, 4), torch.tensor([2, 5]), torch.ones(2, 4))
    assert not recording.refusal
    assert write_indices(recording) == found
