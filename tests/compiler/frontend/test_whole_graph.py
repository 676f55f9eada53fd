"""The demand that a trace is one graph: torch keeps it in one flag for all threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import _get_error_on_graph_break

import graphcap
from graphcap.compiler.frontend import dynamo
from graphcap.compiler.frontend import target as targets
from graphcap.compiler.frontend.api import target_of


def broken(x: Tensor) -> Tensor:
    x = x + 1
    torch._dynamo.graph_break()
    return x * 2


def test_calls_that_end_in_another_order_than_they_began() -> None:
    dynamo.demand_whole_graph()
    dynamo.demand_whole_graph()
    dynamo.end_demand()
    assert _get_error_on_graph_break(), "the second one is in progress"
    dynamo.end_demand()
    assert not _get_error_on_graph_break()


def test_what_was_demanded_before_is_demanded_after() -> None:
    with torch._dynamo.error_on_graph_break(True):
        dynamo.demand_whole_graph()
        dynamo.graph_is_whole()
        dynamo.end_demand()
        assert _get_error_on_graph_break()
    assert not _get_error_on_graph_break()


class BranchesOnItsSize(nn.Module):
    """The second trace needs a size, where a break is possible: a size in a branch within a function call."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = False

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        if self.branches and x.shape[0] > 4:
            x = x + 1
        return x - 1


def test_a_later_trace_is_whole_too(graphs: list[Any]) -> None:
    """Where a size that is unknown to the trace would break the graph, known sizes are tried, as in a first trace."""
    model = graphcap.compile(BranchesOnItsSize(), dynamic_arg_dims={"x": {0: "num_tokens"}})
    torch.testing.assert_close(model(torch.ones(3, 2)), torch.ones(3, 2))
    target = target_of(model)
    assert target is not None
    assert target.marking == "unbacked"
    model.branches = True
    for size, expected in ((8, 2.0), (3, 1.0), (9, 2.0)):
        torch.testing.assert_close(model(torch.ones(size, 2)), torch.full((size, 2), expected))
    assert target.marking == "dynamic"
    assert len(graphs) == 3, "one before, one a branch"


def test_a_later_trace_that_breaks_for_another_reason_may_break(graphs: list[Any]) -> None:
    ran = []

    class Speaks(nn.Module):
        speaks = False

        def forward(self, x: Tensor) -> Tensor:
            x = x * 2
            if self.speaks:
                note()
            return x - 1

    @torch._dynamo.disable
    def note() -> None:
        ran.append(1)

    model = graphcap.compile(Speaks(), dynamic_arg_dims={"x": {0: "num_tokens"}})
    model(torch.ones(3, 2))
    model.speaks = True
    for size in (3, 5):
        torch.testing.assert_close(model(torch.ones(size, 2)), torch.ones(size, 2))
    assert ran == [1, 1]
    target = target_of(model)
    assert target is not None
    assert target.marking == "unbacked"
    assert not _get_error_on_graph_break()


def test_what_a_compiled_graph_calls_later_may_break(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace of other code within a call says nothing about the target's graph."""

    @torch.compile(backend="eager")
    def inner(x: Tensor, by: int) -> Tensor:
        x = x * by
        torch._dynamo.graph_break()
        return x + 1

    by, ran = 2, []

    def calls_inner(gm: torch.fx.GraphModule, inputs: Any, **kwargs: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            ran.append(by)
            return [inner(out, by) for out in gm.forward(*args)]

        return run

    monkeypatch.setattr(targets, "backend", lambda: calls_inner)
    monkeypatch.setenv("GRAPHCAP_DIRECT_CALL", "0")
    outer = graphcap.compile(lambda x: x + 1, dynamic_arg_dims={"x": 0})
    for by in (2, 3, 4):
        torch.testing.assert_close(outer(torch.ones(3, 2)), torch.full((3, 2), 2.0 * by + 1))
    assert ran == [2, 3, 4]
    assert not _get_error_on_graph_break()


def test_a_call_beyond_the_recompile_limit_runs_eager(graphs: list[Any]) -> None:
    class Counted(nn.Module):
        number = 0

        def forward(self, x: Tensor) -> Tensor:
            return x + self.number

    model = graphcap.compile(Counted(), dynamic_arg_dims={"x": {0: "num_tokens"}})
    with torch._dynamo.config.patch(recompile_limit=2, allow_unspec_int_on_nn_module=False):
        for model.number in range(5):
            torch.testing.assert_close(model(torch.ones(3, 2)), torch.full((3, 2), 1.0 + model.number))
    assert len(graphs) == 2


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
