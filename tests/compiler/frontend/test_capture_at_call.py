"""capture without make_inputs: the next call is served, then the ladder is captured with inputs like it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcap
from graphcap import CaptureSummary
from graphcap.compiler.frontend import serving
from graphcap.errors import StepError
from tests.compiler.small import Cached

SETTINGS: dict[str, Any] = {"compiler": "eager", "simulate": True, "cache": False, "capture_sizes": [2, 4, 8]}


DIMS = {"x": 0, "slots": 0}


def compiled(**settings: Any) -> Cached:
    torch.manual_seed(0)
    return graphcap.compile(Cached(10), dynamic_arg_dims=DIMS, **{**SETTINGS, "pad": {"slots": -1}, **settings})


def expected(model: Cached, x: Tensor) -> Tensor:
    return model.linear(x) + x


def call(model: Cached, n: int) -> None:
    x = torch.randn(n, 4)
    torch.testing.assert_close(model(x, torch.arange(n)), expected(model, x))


def replays(model: Any) -> int:
    return sum(region.replays for region in graphcap.explain(model).regions)


def assert_captured(summary: CaptureSummary) -> None:
    assert [key.num_tokens for key in summary.captured] == [8, 4, 2], summary
    assert not summary.skipped
    assert not summary.waits_for


@torch.no_grad()
def test_the_first_call_is_served_and_its_ladder_captured() -> None:
    model = compiled()
    summary = graphcap.capture(model)
    assert str(summary) == "waiting for the next call of Cached.forward"
    call(model, 3)
    assert_captured(summary)
    assert model.calls.item() == 1
    with graphcap.allow_capture(False):
        for n in (3, 4, 7, 2, 8):
            call(model, n)
    assert replays(model) >= 5
    assert model.calls.item() == 6


@torch.no_grad()
def test_a_later_call_will_do() -> None:
    model = compiled()
    for n in (3, 5):
        call(model, n)
    summary = graphcap.capture(model)
    call(model, 5)
    assert_captured(summary)
    assert model.calls.item() == 3


@torch.no_grad()
def test_the_cache_has_what_calls_wrote_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padded rows write where nobody reads, so that a cache which is too large to be put back is safe as well."""
    monkeypatch.setattr(serving, "_STATE_BYTES", 16)
    model = compiled()
    summary = graphcap.capture(model)
    x = torch.randn(3, 4)
    model(x, torch.arange(3))
    assert torch.equal(model.cache[:3], x)
    assert not model.cache[3:].any()
    assert summary.captured


@torch.no_grad()
def test_a_write_that_nobody_declared_is_refused_where_it_could_not_be_put_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serving, "_STATE_BYTES", 16)
    model = compiled(pad={})
    summary = graphcap.capture(model)
    x = torch.randn(3, 4)
    with pytest.warns(UserWarning, match="too large to be put back, and slots says where it is written"):
        out = model(x, torch.arange(3))
    torch.testing.assert_close(out, expected(model, x))
    assert torch.equal(model.cache[:3], x)
    assert model.calls.item() == 1
    assert (summary.captured, len(summary.warnings)) == ((), 1)


@torch.no_grad()
def test_a_write_that_nobody_declared_is_put_back() -> None:
    model = compiled(pad={})
    graphcap.capture(model)
    x = torch.randn(3, 4)
    model(x, torch.arange(3))
    assert torch.equal(model.cache[:3], x)
    assert not model.cache[3:].any()


@torch.no_grad()
def test_a_cache_of_the_callers_is_put_back() -> None:
    def store(x: Tensor, slots: Tensor, cache: Tensor) -> Tensor:
        cache += 1
        cache[slots] = x
        return x * 2

    fast = graphcap.compile(store, dynamic_arg_dims=DIMS, pad={"slots": -1}, **SETTINGS)
    summary, cache, x = graphcap.capture(fast), torch.zeros(10, 4), torch.randn(3, 4)
    assert torch.equal(fast(x, torch.arange(3), cache), x * 2)
    assert_captured(summary)
    assert torch.equal(cache[:3], x)
    assert (cache[3:] == 1).all()


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


@graphcap.support_graph_compile(dynamic_arg_dims={"x": 0}, **SETTINGS)
class Decorated(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def triple(x: Tensor) -> Tensor:
    return x * 3


@pytest.mark.parametrize(
    "make",
    [
        Decorated,
        lambda: graphcap.compile(triple, dynamic_arg_dims={"x": 0}, **SETTINGS),
        lambda: graphcap.compile(Scaled().forward, dynamic_arg_dims={"x": 0}, **SETTINGS),
        lambda: graphcap.compile(Scaled(), dynamic_arg_dims={"x": 0}, **SETTINGS),
    ],
    ids=["decorator", "function", "method", "module"],
)
@torch.inference_mode()
def test_whatever_was_compiled(make: Callable[[], Any]) -> None:
    target = make()
    summary = graphcap.capture(target)
    for n in (5, 3, 8):
        x = torch.randn(n, 4)
        torch.testing.assert_close(target(x), x * 3)
    assert_captured(summary)
    assert replays(target) >= 2


@torch.no_grad()
def test_nothing_of_the_call_is_kept_alive() -> None:
    @dataclass
    class Extra:
        shift: Tensor

    def shifted(x: Tensor, extra: Extra) -> Tensor:
        return x + extra.shift

    fast = graphcap.compile(shifted, dynamic_arg_dims={"x": 0}, **SETTINGS)
    summary = graphcap.capture(fast)
    x, extra = torch.randn(3, 4), Extra(torch.ones(4))
    held = [weakref.ref(each) for each in (x, extra, extra.shift)]
    collecting = gc.isenabled()
    gc.disable()
    try:
        assert torch.equal(fast(x, extra), x + 1)
        assert_captured(summary)
        del x, extra
        assert [ref() for ref in held] == [None] * 3
    finally:
        if collecting:
            gc.enable()


@torch.no_grad()
def test_a_result_is_the_callers_also_where_outputs_are_static() -> None:
    model = compiled(outputs="static")
    for _ in range(4):
        call(model, 4)
    graphcap.capture(model)
    x = torch.randn(4, 4)
    out = model(x, torch.arange(4))
    torch.testing.assert_close(out, expected(model, x))


@torch.no_grad()
def test_a_model_that_cannot_take_the_fill_serves_its_calls() -> None:
    def checked(x: Tensor, lens: Tensor) -> Tensor:
        return x / check(lens)[:, None]

    @torch.library.custom_op("capture_at_call::check", mutates_args=())
    def check(lens: Tensor) -> Tensor:
        if not lens.all():
            raise ValueError("a request without tokens")
        return lens.clone()

    check.register_fake(torch.empty_like)
    fast = graphcap.compile(checked, dynamic_arg_dims={"x": 0, "lens": 0}, **SETTINGS)
    summary = graphcap.capture(fast)
    with pytest.warns(UserWarning, match="the ladder is not captured: .*a request without tokens"):
        assert torch.equal(fast(torch.ones(3, 4), torch.ones(3)), torch.ones(3, 4))
    assert "a request without tokens" in str(summary)
    assert torch.equal(fast(torch.ones(3, 4), torch.ones(3)), torch.ones(3, 4))


@torch.no_grad()
def test_a_call_that_fails_is_not_the_one() -> None:
    model = compiled()
    summary = graphcap.capture(model)
    with pytest.raises(IndexError):
        model(torch.randn(3, 4), torch.full((3,), 99))
    assert summary.waits_for
    call(model, 3)
    assert_captured(summary)


@torch.no_grad()
def test_the_step_of_the_call_is_resized_too() -> None:
    @torch.library.custom_op("capture_at_call::attend", mutates_args=())
    def attend(x: Tensor) -> Tensor:
        lens = graphcap.current_step().inputs["lens"]
        seen.append(lens.tolist())
        return x * (1 + lens.sum())

    attend.register_fake(torch.empty_like)
    seen: list[list[int]] = []
    fast = graphcap.compile(
        lambda x: attend(x + 1),
        dynamic_arg_dims={"x": {0: "num_tokens"}, "step.lens": {0: "num_reqs"}},
        pad={"step.lens": 0},
        specialize_tags=("lora",),
        **{**SETTINGS, "capture_sizes": [2, 4]},
    )
    summary = graphcap.capture(fast)
    with graphcap.step(num_tokens=3, num_reqs=1, tags={"lora": 2}, inputs={"lens": torch.tensor([3])}):
        assert torch.equal(fast(torch.ones(3, 4)), torch.full((3, 4), 8.0))
    assert seen[0] == [3]
    assert [0] * 4 in seen[1:]
    assert not any(any(lens) for lens in seen[1:])
    assert [(key.num_tokens, key.tags) for key in summary.captured] == [(4, (("lora", 2),)), (2, (("lora", 2),))]


@torch.no_grad()
def test_an_encoder_has_a_grid() -> None:
    fast = graphcap.compile(
        lambda x: x.softmax(-1) * 2,
        dynamic_arg_dims={"x": {0: "batch", 1: "seq"}},
        **{**SETTINGS, "capture_sizes": {"batch": [2, 4], "seq": [8, 16]}},
    )
    summary = graphcap.capture(fast)
    x = torch.randn(3, 11, 4)
    torch.testing.assert_close(fast(x), x.softmax(-1) * 2)
    assert [str(key) for key in summary.captured] == [
        "batch=4, seq=16",
        "batch=4, seq=8",
        "batch=2, seq=16",
        "batch=2, seq=8",
    ]
    with graphcap.allow_capture(False):
        for batch, seq in [(3, 11), (1, 16), (4, 5)]:
            x = torch.randn(batch, seq, 4)
            torch.testing.assert_close(fast(x), x.softmax(-1) * 2)
    assert replays(fast) >= 3
    assert graphcap.dispatch(fast, sizes={"batch": 3, "seq": 11}).sizes == (("batch", 4), ("seq", 16))


def test_what_brings_no_inputs_is_refused() -> None:
    for model in (nn.Linear(2, 2), graphcap.compile(nn.Linear(2, 2), enforce_eager=True)):
        with pytest.raises(StepError, match="give make_inputs"):
            graphcap.capture(model)


@pytest.mark.gpu
@torch.inference_mode()
def test_on_a_gpu() -> None:
    """The served call, the padded ones after it, and the cache."""
    torch.manual_seed(0)
    settings = {**SETTINGS, "simulate": False}
    model = graphcap.compile(Cached(10).cuda(), dynamic_arg_dims=DIMS, pad={"slots": -1}, **settings)
    summary = graphcap.capture(model)
    for n in (3, 4, 7, 2, 8):
        x = torch.randn(n, 4, device="cuda")
        torch.testing.assert_close(model(x, torch.arange(n, device="cuda")), expected(model, x))
        assert torch.equal(model.cache[:n], x)
    assert_captured(summary)
    assert model.calls.item() == 5
    assert not model.cache[8:].any()
    assert replays(model) >= 4
