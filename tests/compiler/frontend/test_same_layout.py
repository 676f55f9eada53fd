"""guards="sealed": a call that looks exactly like an earlier one goes without the guards on its arguments."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo import mark_static

import graphcap
from graphcap import native
from graphcap.compiler.frontend.seal import EVERY
from graphcap.errors import DimError
from tests.compiler.frontend.calls import assert_right, target_of


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor | None = None, times: int = 1) -> Tensor:
        x = self.fc(x.float() if x.dtype is torch.int64 else x) * times
        return x if y is None else x + y.float().sum(-1, keepdim=True)


def sealed(**options: Any) -> Any:
    model = graphcap.compile(Model().eval(), guards="sealed", compiler="eager", **options)
    for _ in range(4):
        model(torch.randn(3, 4))
    return model


@pytest.fixture(autouse=True)
def sealed_without_grad(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(native, "status", lambda: "extension")  # a seal is only kept with it
    with torch.no_grad():
        yield


def test_guards_on_arguments_are_evaluated_once_for_each_layout(evaluations: list[bool]) -> None:
    model = sealed()
    evaluations.clear()
    for rows in (3, 3, 5, 5, 3, 5, 7, 7):
        assert_right(model, torch.randn(rows, 4))
    assert evaluations == [True, True]  # for 5 and for 7


@pytest.mark.parametrize(
    "other",
    [
        lambda: (torch.randn(3, 4).double().float().t().contiguous().t(),),
        lambda: (torch.ones(3, 4, dtype=torch.int64),),
        lambda: (torch.randn(3, 4, requires_grad=True),),
        lambda: (nn.Parameter(torch.randn(3, 4)),),
        lambda: (torch.randn(3, 4), torch.randn(3, 4)),
        lambda: (torch.randn(3, 4), None, 2),
        lambda: (torch.randn(6, 4)[::2],),
    ],
    ids=["strides", "dtype", "requires_grad", "type", "one more", "a number", "stride of the batch"],
)
def test_another_layout_is_for_the_guards(evaluations: list[bool], other: Callable[[], tuple[Any, ...]]) -> None:
    model = sealed()
    evaluations.clear()
    assert_right(model, *other())
    assert evaluations  # it was not taken for the other one
    for _ in range(3):
        assert_right(model, *other())
        assert_right(model, torch.randn(3, 4))


@pytest.mark.parametrize(
    "mode",
    [torch.enable_grad, torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16)],
    ids=["enable_grad", "inference_mode", "autocast"],
)
def test_another_mode_is_for_the_guards(
    evaluations: list[bool], mode: Callable[[], contextlib.AbstractContextManager[Any]]
) -> None:
    model, x = sealed(), torch.randn(3, 4)
    evaluations.clear()
    with mode():
        with graphcap.disabled():
            expected = model(x)
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
        assert evaluations
    assert_right(model, x)


def test_a_tensor_with_a_mark_is_for_the_guards(evaluations: list[bool]) -> None:
    model, x = sealed(), torch.randn(3, 4)
    mark_static(x, 0)
    evaluations.clear()
    assert_right(model, x)
    assert evaluations


def test_declared_dims_are_checked_for_what_looks_new() -> None:
    model = sealed(dynamic_arg_dims={"x": {0: "n"}, "y": {0: "n"}})
    for _ in range(4):
        assert_right(model, torch.randn(3, 4), torch.randn(3, 4))
    with pytest.raises(DimError, match="n"):
        model(torch.randn(3, 4), torch.randn(1, 4))


def test_one_tensor_given_twice_is_no_call_like_another(evaluations: list[bool]) -> None:
    model, x = sealed(dynamic_arg_dims={"x": {0: "n"}, "y": {0: "n"}}), torch.randn(3, 4)
    for _ in range(4):
        assert_right(model, x, torch.randn(3, 4))
    assert_right(model, x, x)


def test_a_reset_of_dynamo_ends_it() -> None:
    model = sealed()
    torch._dynamo.reset()
    before = target_of(model).direct.count
    model(torch.randn(3, 4))
    assert target_of(model).direct.count == before


def test_nothing_of_a_call_is_kept() -> None:
    model = sealed()
    x = torch.randn(3, 4)
    reference = weakref.ref(x)
    model(x)
    del x
    assert reference() is None


VALUES: list[Callable[[], Any]] = [
    lambda: torch.randn(3, 4),
    lambda: torch.randn(5, 4),
    lambda: torch.randn(4, 3).t(),
    lambda: torch.ones(3, 4, dtype=torch.int64),
    lambda: torch.randn(3, 4, requires_grad=True),
]
SECOND: list[Callable[[], Any]] = [lambda: None, lambda: torch.randn(1, 4), lambda: torch.randn(1, 2)]


@pytest.fixture(scope="module")
def one_model() -> Any:
    return graphcap.compile(Model().eval(), guards="sealed", compiler="eager", dynamic_arg_dims={})


@settings(max_examples=30, deadline=None)
@given(
    calls=st.lists(
        st.tuples(st.integers(0, len(VALUES) - 1), st.integers(0, len(SECOND) - 1), st.integers(1, 2), st.booleans()),
        max_size=8,
    )
)
def test_any_traffic_is_what_it_is_live(one_model: Any, calls: list[tuple[int, int, int, bool]]) -> None:
    for first, second, times, by_name in calls:
        args = (VALUES[first](), SECOND[second]())
        with torch.no_grad():
            if by_name:
                assert_right(one_model, *args, times=times)
            else:
                assert_right(one_model, *args, times)


def test_a_setting_of_the_process_is_noticed_with_the_globals() -> None:
    """Not at once: as late as a global. Then the model is traced anew; that is no mistake of the user."""
    model, x = sealed(), torch.randn(3, 4)
    traces = [len(graphcap.explain(model).regions)]
    torch.set_default_dtype(torch.float64)
    try:
        for _ in range(EVERY + 1):
            assert_right(model, x)
        traces.append(len(graphcap.explain(model).regions))
    finally:
        torch.set_default_dtype(torch.float32)
    for _ in range(EVERY + 1):
        assert_right(model, x)
    traces.append(len(graphcap.explain(model).regions))
    assert traces == [1, 2, 2], "traced for the other dtype, and the first graph serves again"


def test_a_mode_that_was_on_at_the_trace_is_part_of_what_is_known(evaluations: list[bool]) -> None:
    model = graphcap.compile(Model().eval(), guards="sealed", compiler="eager")
    x = torch.randn(3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(4):
            assert model(x).dtype is torch.bfloat16
        evaluations.clear()
        assert model(x).dtype is torch.bfloat16
        assert evaluations == []
    with torch.autocast("cpu", dtype=torch.float16):
        assert model(x).dtype is torch.float16
    assert model(x).dtype is torch.float32
