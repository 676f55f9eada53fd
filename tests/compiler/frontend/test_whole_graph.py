"""The demand that a first trace is one graph: torch keeps it in one flag for all threads."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import _get_error_on_graph_break

import graphcap
from graphcap.compiler.frontend import dynamo


def broken(x: Tensor) -> Tensor:
    x = x + 1
    torch._dynamo.graph_break()
    return x * 2


def test_calls_that_end_in_another_order_than_they_began() -> None:
    first, second = dynamo.whole_graph(), dynamo.whole_graph()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert _get_error_on_graph_break(), "the second one is in progress"
    second.__exit__(None, None, None)
    assert not _get_error_on_graph_break()


def test_what_was_demanded_before_is_demanded_after() -> None:
    with torch._dynamo.error_on_graph_break(True):
        with dynamo.whole_graph():
            dynamo.graph_is_whole()
        assert _get_error_on_graph_break()
    assert not _get_error_on_graph_break()


def test_first_calls_of_several_threads_leave_no_demand_to_others() -> None:
    models: list[Any] = [graphcap.compile(nn.Linear(4, 4), compiler="eager") for _ in range(4)]
    start = threading.Barrier(8)

    def run(model: Any) -> None:
        start.wait()
        with torch.no_grad():
            model(torch.ones(3, 4))

    threads = [threading.Thread(target=run, args=(model,)) for model in models * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not _get_error_on_graph_break()
    torch.testing.assert_close(torch.compile(broken, backend="eager")(torch.ones(3)), broken(torch.ones(3)))
