"""``outputs="static"`` and ``"ring:N"`` through ``torch.compile``: right after a call, results are those of eager."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graphcap.compiler.backend import graphcap
from graphcap.errors import StaleOutputError
from tests.compiler.like_eager import assert_like_eager
from tests.compiler.random_programs import OPERATIONS, Operation, random_program
from tests.compiler.test_semantics import CASES, build, live

POLICIES = ["static", "ring:2"]

#: The cases where outputs alias something, are strange, or become arguments of another graph.
NAMES = [
    "twins",
    "dict in, dict out",
    "ints floats bools and strings out",
    "the same tensor passed twice",
    "integer and bool and half tensors",
    "zero-dimensional tensor",
    "expanded input",
    "an input is mutated and returned",
    "an input is mutated through a view",
    "an intermediate is mutated after it crossed a cut",
    "a buffer that is assigned anew",
    "a view and its base cross a cut and one is written",
    "an input comes back",
    "views of an input come back",
    "a view made inside a cut group comes back",
    "outputs share memory",
    "the same output twice",
    "a parameter comes back",
    "a view of a buffer comes back",
    "a mutated view of an input comes back",
    "non-contiguous outputs",
    "a constant tensor comes back",
    "a graph break in the middle",
    "a branch on data",
    "a growing cache",
]


@pytest.mark.parametrize("outputs", POLICIES)
@pytest.mark.parametrize("name", NAMES)
def test_like_eager(name: str, outputs: str) -> None:
    each = CASES[name]
    assert_like_eager(build(each), each.inputs, outputs=outputs, **{"calls": 6, **each.options})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["outputs share memory", "non-contiguous outputs", "a graph break in the middle"])
def test_like_eager_through_inductor(name: str) -> None:
    each = CASES[name]
    assert_like_eager(build(each), each.inputs, outputs="static", compiler="inductor", **each.options)


@given(operations=OPERATIONS, cuts=st.sets(st.integers(0, 20)), outputs=st.sampled_from(POLICIES))
@hypothesis_settings(max_examples=10)
def test_random_programs_are_like_eager(operations: list[Operation], cuts: set[int], outputs: str) -> None:
    def cut(node: torch.fx.Node) -> bool:
        return list(node.graph.nodes).index(node) in cuts

    assert_like_eager(
        lambda: random_program(operations),
        lambda i: (torch.randn(4, 4), torch.randn(4, 4)),
        calls=6,
        replayed=False,
        splitting_rules=(cut,),
        cudagraph_mode="PIECEWISE",
        outputs=outputs,
    )


class Chained(nn.Module):
    """Three graphs of one forward: the first one's result is read by the others and after them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        torch._dynamo.graph_break()
        y = live(self.second(h)) + h
        torch._dynamo.graph_break()
        return live(y) * h - x


@pytest.mark.parametrize("outputs", POLICIES)
@pytest.mark.parametrize("check", [False, True])
def test_a_result_of_one_graph_lasts_while_others_of_the_forward_run(
    monkeypatch: pytest.MonkeyPatch, outputs: str, check: bool
) -> None:
    """The check must not make Dynamo compile again, either: every call after the capture is a replay."""
    monkeypatch.setenv("GRAPHCAP_CHECK_OUTPUTS", str(check))
    models: list[Chained] = []  # the counters go with the model

    def make() -> Chained:
        models.append(Chained())
        return models[-1]

    regions = assert_like_eager(make, lambda i: (torch.randn(4, 6),), calls=6, outputs=outputs)
    assert [runner.stats.replays for each in regions for runner in each.runners] == [4] * 3


def compiled(outputs: str) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    options = {"outputs": outputs, "simulate": True, "compiler": "eager", "capture_after": 2}
    return torch.compile(model, backend=graphcap, options=options)  # type: ignore[return-value]


@pytest.mark.parametrize(("outputs", "lifetime"), [("static", 1), ("ring:3", 3)])
@torch.no_grad()
def test_a_stale_output_raises(monkeypatch: pytest.MonkeyPatch, outputs: str, lifetime: int) -> None:
    monkeypatch.setenv("GRAPHCAP_CHECK_OUTPUTS", "1")
    model = compiled(outputs)
    for _ in range(3):
        model(torch.randn(2, 4))
    kept = [model(torch.randn(2, 4)) for _ in range(lifetime + 1)]
    assert all(torch.isfinite(each).all() for each in kept[1:])
    with pytest.raises(StaleOutputError, match=f"outputs='{outputs}'"):
        repr(kept[0])


@torch.no_grad()
def test_a_stale_output_given_to_a_compiled_function_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHCAP_CHECK_OUTPUTS", "1")
    model = compiled("static")
    for _ in range(3):
        model(torch.randn(2, 4))
    old, _ = model(torch.randn(2, 4)), model(torch.randn(2, 4))
    with pytest.raises(RuntimeError, match="was read after a later replay had written into its memory"):
        model(old)
    assert model(torch.randn(2, 4)).isfinite().all()


@torch.no_grad()
def test_a_decode_loop_that_feeds_its_output_back() -> None:
    model = compiled("static")
    expected = x = torch.randn(2, 4)
    for _ in range(8):
        expected, x = model._orig_mod(expected), model(x)
        torch.testing.assert_close(x, expected, rtol=0, atol=0)
