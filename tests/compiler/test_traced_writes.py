"""An ``@graphcap.eager`` function that writes what it holds does so once in each call, also in one that is traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcap

OPTIONS = {"compiler": "eager", "simulate": True, "cache": False}
WAYS: dict[str, Callable[[Any], Any]] = {
    "torch.compile": lambda fn: torch.compile(fn, backend="graphcap", options=OPTIONS),
    "graphcap.compile": lambda fn: graphcap.compile(fn, dynamic_arg_dims={"x": 0}, **OPTIONS),
    "breakable": lambda fn: graphcap.compile(fn, dynamic_arg_dims={"x": 0}, frontend="breakable", **OPTIONS),
}
each_way = pytest.mark.parametrize("compiled", WAYS.values(), ids=WAYS.keys())


@each_way
@pytest.mark.parametrize("shape", [(), (1,), (3,)])
def test_a_counter_counts_calls(compiled: Callable[[Any], Any], shape: tuple[int, ...]) -> None:
    count = torch.zeros(shape, dtype=torch.int64)

    @graphcap.eager
    def attend(q: Tensor) -> Tensor:
        count.add_(1)
        return q * 2

    def fn(x: Tensor) -> Tensor:
        return attend(x + 1) - 1

    run = compiled(fn)
    with torch.no_grad():
        for number in range(1, 6):
            x = torch.randn(2)
            torch.testing.assert_close(run(x), (x + 1) * 2 - 1)
            assert count.eq(number).all(), count


@each_way
def test_a_cache_is_filled_where_its_own_table_says(compiled: Callable[[Any], Any]) -> None:
    """The table moves on by an operation on nothing but what the function holds, and then says where rows go."""
    cache, slots = torch.zeros(32, 4), torch.arange(3)

    @graphcap.eager
    def attend(k: Tensor) -> Tensor:
        cache[slots] = k
        slots.add_(3)
        return k + cache.sum()

    def fn(x: Tensor) -> Tensor:
        return attend(x * 2) + 1

    run = compiled(fn)
    rows = torch.randn(5, 3, 4)
    with torch.no_grad():
        for number, x in enumerate(rows, 1):
            expected = torch.zeros(32, 4)
            expected[: 3 * number] = 2 * rows[:number].flatten(0, 1)
            torch.testing.assert_close(run(x), x * 2 + expected.sum() + 1)
            torch.testing.assert_close(cache, expected)
            assert slots.tolist() == [3 * number, 3 * number + 1, 3 * number + 2]


@each_way
def test_running_statistics_are_updated_once(compiled: Callable[[Any], Any]) -> None:
    norm = nn.BatchNorm1d(4)

    @graphcap.eager
    def normed(x: Tensor) -> Tensor:
        return norm(x)

    run = compiled(lambda x: normed(x + 1) * 2)
    with torch.no_grad():
        for number in range(1, 5):
            run(torch.randn(6, 4))
            assert norm.num_batches_tracked.item() == number


def test_a_value_that_the_trace_would_have_to_write_first_is_read_outside_of_it() -> None:
    """What depends on it cannot be traced: the graph breaks there, and results are right."""
    count = torch.zeros((), dtype=torch.int64)

    @graphcap.eager
    def grown(x: Tensor) -> Tensor:
        count.add_(1)
        return x * count.item()

    run = torch.compile(lambda x: grown(x + 1) - 1, backend="graphcap", options=OPTIONS)
    with torch.no_grad():
        for number in range(1, 5):
            x = torch.randn(2)
            torch.testing.assert_close(run(x), (x + 1) * number - 1)
            assert count.item() == number
