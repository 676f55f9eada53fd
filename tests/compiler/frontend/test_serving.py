"""dispatch and capture on compiled models."""

from __future__ import annotations

import gc
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

import graphcap
from graphcap import GraphKey
from graphcap.compiler.frontend.subject import runners_of
from graphcap.cudagraph.counters.cost import StepTime
from graphcap.cudagraph.hardware.simulated import SimulatedDevice
from graphcap.cudagraph.hardware.simulated_recording import SimulatedSegment
from graphcap.cudagraph.recording.sharing import Sharing, UnlikeOtherSizes
from graphcap.errors import StepError

SETTINGS: dict[str, Any] = {"compiler": "eager", "simulate": True, "cache": False, "capture_sizes": [2, 4, 8]}


class Counting(nn.Module):
    """Row-wise, and counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.linear(x)


def compiled(**settings: Any) -> Counting:
    torch.manual_seed(0)
    return graphcap.compile(Counting(), dynamic_arg_dims={"x": 0}, **{**SETTINGS, **settings})


def inputs(key: GraphKey) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randn(key.num_tokens, 4),), {}


def plans_of(model: nn.Module) -> list[Any]:
    return [plan for region in graphcap.explain(model).regions for plan in region.plans]


def test_the_ladder_is_captured_largest_first_and_traffic_replays() -> None:
    model = compiled()
    with torch.no_grad():
        summary = graphcap.capture(model, inputs)
        assert [key.num_tokens for key in summary.captured] == [8, 4, 2]
        assert not summary.skipped
        assert summary.bytes > 0
        x = torch.randn(4, 4)
        assert torch.allclose(model(x), model.linear(x))
    assert sum(plan.replays for plan in plans_of(model)) >= 1


def test_a_rung_whose_capture_showed_that_a_graph_does_not_pay_is_captured_again(monkeypatch) -> None:
    """The first rung that is captured is the one that measures; it must not be the one that is missing."""

    @graphcap.eager
    def between(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    class Cut(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return between(x + 1).relu().cumsum(1)

    def clock(call: Any) -> StepTime:
        call()
        is_replay = isinstance(getattr(call, "__self__", None), SimulatedSegment)
        seen.append(is_replay)
        return StepTime(8.0, 8.0) if is_replay or len(seen) > 11 else StepTime(2.0, 2.0)

    seen: list[bool] = []
    monkeypatch.setattr(SimulatedDevice, "stopwatch", staticmethod(clock))
    model = graphcap.compile(Cut(), dynamic_arg_dims={"x": 0}, **SETTINGS)
    with torch.no_grad():
        summary = graphcap.capture(model, inputs)
        assert [key.num_tokens for key in summary.captured] == [8, 4, 2]
        x = torch.randn(4, 4)
        assert torch.allclose(model(x), ((x + 1) * 2).relu().cumsum(1))
    assert len(seen) == 22
    assert {plan.num_segments for plan in plans_of(model)} == {1}
    assert "a graph would not pay: 2.0 us live, 8.0 us replayed" in str(graphcap.explain(model))


def test_state_is_as_before_the_capture() -> None:
    model = compiled()
    with torch.no_grad():
        graphcap.capture(model, inputs)
        assert model.calls.item() == 0
        model(torch.randn(4, 4))
        assert model.calls.item() == 1


def test_inputs_are_made_afresh_inside_of_their_step() -> None:
    made: Counter[int] = Counter()
    model = compiled(num_warmups=3)

    def make(key: GraphKey) -> tuple[tuple[Any, ...], dict[str, Any]]:
        assert graphcap.current_step().key == key
        made[key.num_tokens] += 1
        return inputs(key)

    with torch.no_grad():
        graphcap.capture(model, make)
    assert made[4] == made[2] == 3 + 1


@pytest.mark.parametrize(("num_warmups", "further"), [(None, 0), (0, 0), (1, 1), (2, 2)])
def test_a_further_size_is_warmed_up_where_that_is_asked_for(num_warmups: int | None, further: int) -> None:
    made: Counter[int] = Counter()
    model = compiled(capture_sizes=[1, 2, 4, 8], num_warmups=num_warmups)

    def make(key: GraphKey) -> tuple[tuple[Any, ...], dict[str, Any]]:
        made[key.num_tokens] += 1
        return inputs(key)

    with torch.no_grad():
        summary = graphcap.capture(model, make)
    assert len(summary.captured) == 4
    assert made[4] == made[2] == further + 1, "the first size has shown how values share memory"
    assert made[8] >= (2 if num_warmups is None else num_warmups) + 1
    # A kind of its own; without warm-ups its first recording becomes one.
    assert made[1] == {None: 2, 0: 1}.get(num_warmups, num_warmups) + 1


@torch.library.custom_op("graphcap_tests::kept_by_size", mutates_args=())
def kept_by_size(x: torch.Tensor) -> torch.Tensor:
    """Keeps a tensor for each size, made at its first sight: a graph that recorded that would have made none."""
    if len(x) not in _KEPT:
        _KEPT[len(x)] = torch.arange(len(x), dtype=x.dtype).unsqueeze(1)
    return x + _KEPT[len(x)]


@kept_by_size.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


_KEPT: dict[int, torch.Tensor] = {}


def test_a_further_size_with_a_declared_op_is_warmed_up_once() -> None:
    graphcap.register_op("graphcap_tests::kept_by_size", capture="always")
    _KEPT.clear()
    made: Counter[int] = Counter()

    def shifted(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.graphcap_tests.kept_by_size(x * 2) + 1

    function = graphcap.compile(shifted, dynamic_arg_dims={"x": 0}, **{**SETTINGS, "cudagraph_mode": "FULL"})

    def make(key: GraphKey) -> tuple[tuple[Any, ...], dict[str, Any]]:
        made[key.num_tokens] += 1
        return inputs(key)

    with torch.no_grad():
        assert len(graphcap.capture(function, make).captured) == 3
        assert made[4] == made[2] == 1 + 1
        for size in (8, 4, 2):
            x = torch.randn(size, 4)
            torch.testing.assert_close(function(x), x * 2 + torch.arange(size).unsqueeze(1) + 1)
    (region,) = graphcap.explain(function).regions
    assert sum(plan.replays for plan in region.plans) >= 3


@pytest.mark.parametrize("breaks", [False, True])
def test_the_ladder_is_recorded_without_attention_that_nobody_reads(breaks: bool) -> None:
    """Where the model has several graphs, what one of them leaves is read by the Python between them."""
    runs: Counter[int] = Counter()

    @torch.library.custom_op("graphcap_test::attend_into", mutates_args=("cache", "out"))
    def attend_into(x: torch.Tensor, slots: torch.Tensor, cache: torch.Tensor, out: torch.Tensor) -> None:
        runs[x.shape[0]] += 1
        real = slots >= 0
        cache[slots[real]] = x[real]
        out.copy_(x * 2)

    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("cache", torch.zeros(16, 4))

        def forward(self, x: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
            x = self.linear(x)
            out = x.new_empty(x.shape)
            attend_into(x, slots, self.cache, out)
            if breaks:
                torch._dynamo.graph_break()
            return self.linear(out)

    def made(key: GraphKey) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (torch.randn(key.num_tokens, 4), torch.arange(key.num_tokens)), {}

    torch.manual_seed(0)
    settings = {**SETTINGS, "cudagraph_mode": "PIECEWISE", "pad": {"slots": -1}}
    model = graphcap.compile(Attending(), dynamic_arg_dims={"x": 0, "slots": 0}, **settings)
    with torch.no_grad():
        summary = graphcap.capture(model, made)
        assert [key.num_tokens for key in summary.captured] == [8, 4, 2]
        assert (runs[4], runs[2]) == ((3, 3) if breaks else (1, 1)), "by warm-ups, and where it is recorded as a whole"
        assert runs[8] >= 3, "the first size is recorded while it runs"
        assert not model.cache.any(), "and is put back"
        for rows in (8, 7, 4, 3, 2):
            x, slots = made(GraphKey(rows))[0]
            y = model.linear(x)
            torch.testing.assert_close(model(x, slots), model.linear(y * 2))
            torch.testing.assert_close(model.cache[:rows], y)
    assert sum(plan.replays for plan in plans_of(model)) >= 5


def test_without_warm_ups_the_smaller_sizes_are_called_once() -> None:
    made: Counter[int] = Counter()
    model = compiled(num_warmups=0)

    def make(key: GraphKey) -> tuple[tuple[Any, ...], dict[str, Any]]:
        made[key.num_tokens] += 1
        return inputs(key)

    with torch.no_grad():
        summary = graphcap.capture(model, make)
        assert made[2] == 1
        assert not summary.skipped
        for rows in (1, 2, 3, 4):
            x = torch.randn(rows, 4)
            with graphcap.disabled():
                expected = model(x)
            torch.testing.assert_close(model(x), expected)
    (region,) = graphcap.explain(model).regions
    assert sum(plan.replays for plan in region.plans) >= 3


@pytest.mark.parametrize("collecting", [True, False])
def test_the_collector_is_left_as_it_was(collecting: bool) -> None:
    model, was = compiled(), gc.isenabled()
    seen = []

    def make(key: GraphKey) -> tuple[tuple[Any, ...], dict[str, Any]]:
        seen.append(gc.isenabled())
        return inputs(key)

    try:
        (gc.enable if collecting else gc.disable)()
        with torch.no_grad():
            graphcap.capture(model, make)
        assert gc.isenabled() is collecting
        assert not any(seen)
    finally:
        (gc.enable if was else gc.disable)()


def test_what_make_inputs_raises_comes_through_and_the_model_works() -> None:
    model = compiled()

    def make(key: GraphKey) -> Any:
        if key.num_tokens == 4:
            raise KeyError("no such batch")
        return inputs(key)

    with torch.no_grad():
        with pytest.raises(KeyError, match="no such batch"):
            graphcap.capture(model, make)
        assert model.calls.item() == 0
        x = torch.randn(8, 4)
        assert torch.allclose(model(x), model.linear(x))


def test_a_model_without_a_ladder_is_told_how_to_get_one() -> None:
    with torch.no_grad(), pytest.raises(StepError, match="no ladder to capture"):
        graphcap.capture(compiled(cudagraph_mode="NONE"), inputs)


def test_what_was_not_captured_says_why() -> None:
    model = compiled()
    with torch.no_grad(), graphcap.allow_capture(False):
        summary = graphcap.capture(model, inputs)
    assert not summary.captured
    assert {"captures are not allowed (graphcap.allow_capture(False))"} == set(summary.skipped.values())


def test_a_vetoed_call_runs_live() -> None:
    model = compiled()
    with torch.no_grad():
        graphcap.capture(model, inputs)
        before = sum(plan.replays for plan in plans_of(model))
        with graphcap.step(num_tokens=4, max_mode="NONE"):
            model(torch.randn(4, 4))
    assert sum(plan.replays for plan in plans_of(model)) == before


@pytest.mark.parametrize("mode", ["PIECEWISE", "FULL"])
def test_the_capture_proves_padding_for_every_rung(mode: str) -> None:
    model = compiled(cudagraph_mode=mode, max_padding_ratio=0.9)
    with torch.no_grad():
        graphcap.capture(model, inputs)
        (before,) = graphcap.explain(model).regions
        with graphcap.allow_capture(False):
            for num_tokens in (7, 3, 1, 5):
                with graphcap.step(num_tokens=num_tokens, num_reqs=num_tokens):
                    x = torch.randn(num_tokens, 4)
                    assert torch.allclose(model(x), model.linear(x), atol=1e-6)
    (after,) = graphcap.explain(model).regions
    assert (after.replays - before.replays, after.live_calls) == (4, before.live_calls)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_replaced_weight_is_captured_again_for_every_rung_where_nothing_new_is(name: str) -> None:
    """Weights that arrive while an engine serves, with captures sealed: rungs that are padded to come back as well."""
    model = compiled()
    with torch.no_grad():
        graphcap.capture(model, inputs)
        with graphcap.allow_capture(False):
            model.linear.load_state_dict(
                {name: nn.Parameter(torch.randn_like(getattr(model.linear, name)))}, False, True
            )
            for num_tokens in (8, 3, 2) * 3:
                x = torch.randn(num_tokens, 4)
                assert torch.allclose(model(x), model.linear(x), atol=1e-6)
    (region,) = graphcap.explain(model).regions
    assert {plan.key for plan in region.plans} == {(8,), (4,), (2,)}
    assert min(plan.replays for plan in region.plans) >= 1
    assert region.recaptures == 3


@pytest.mark.filterwarnings("error")
def test_a_grid_is_captured_with_the_names_of_its_dims() -> None:
    settings = {**SETTINGS, "capture_sizes": {"batch": [2, 4], "seq": [8, 16]}}
    torch.manual_seed(0)
    model = graphcap.compile(Counting(), dynamic_arg_dims={"x": {0: "batch", 1: "seq"}}, **settings)
    with torch.no_grad():
        summary = graphcap.capture(model, lambda key: ((torch.randn(key.size("batch"), key.size("seq"), 4),), {}))
        assert [key.num_tokens for key in summary.captured] == [64, 32, 32, 16]
        with graphcap.allow_capture(False):
            x = torch.randn(3, 13, 4)
            before = sum(plan.replays for plan in plans_of(model))
            assert torch.allclose(model(x), model.linear(x), atol=1e-6)
    assert sum(plan.replays for plan in plans_of(model)) == before + 1


class Paired(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a * 2 + b


def paired() -> nn.Module:
    return graphcap.compile(Paired(), dynamic_arg_dims={"a": 0, "b": 0}, **SETTINGS)


def twice(key: GraphKey) -> tuple[tuple[Any, ...], dict[str, Any]]:
    x = torch.randn(key.num_tokens, 4)
    return (x, x), {}


def test_inputs_that_make_another_graph_than_traffic_are_named() -> None:
    model = paired()
    with torch.no_grad():
        model(torch.randn(3, 4), torch.randn(3, 4))
        with pytest.warns(UserWarning, match="made another graph of .* because of the guard"):
            summary = graphcap.capture(model, twice)
    (warning,) = summary.warnings
    assert "a" in warning.split("guard")[1]
    assert "warning: the inputs for 8 tokens made another graph" in str(summary)


def test_traffic_that_makes_another_graph_than_the_captured_one_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model = paired()
    with torch.no_grad():
        assert not graphcap.capture(model, twice).warnings
        with caplog.at_level("WARNING", logger="graphcap"):
            model(torch.randn(3, 4), torch.randn(3, 4))
    (record,) = [each for each in caplog.records if "graphcap.capture()" in each.getMessage()]
    assert "because of the guard" in record.getMessage()
    assert any("find none of those plans" in note for note in graphcap.explain(model).regions[-1].notes)


def test_inputs_like_those_of_traffic_are_not_warned_of(recwarn: pytest.WarningsRecorder) -> None:
    model = paired()
    with torch.no_grad():
        model(torch.randn(3, 4), torch.randn(3, 4))
        summary = graphcap.capture(model, lambda key: (tuple(torch.randn(2, key.num_tokens, 4)), {}))
        model(torch.randn(4, 4), torch.randn(4, 4))
    assert not summary.warnings
    assert not [each for each in recwarn if "another graph" in str(each.message)]


def test_a_summary_reads_well() -> None:
    skipped = {GraphKey(tokens): "no room" for tokens in (64, 56, 48, 40)} | {GraphKey(2, 2, 1): "mixed rows"}
    captured = (GraphKey(8, 8), GraphKey.of_sizes({"batch": 2, "seq": 16}))
    assert str(graphcap.CaptureSummary(captured, skipped, 1.234, 3 * 2**19, ["look here"])).splitlines() == [
        "2 graphs, 1.23 s, 1.5 MiB",
        "not captured: 64 tokens; 56 tokens; 48 tokens; and 1 more: no room",
        "not captured: 2 tokens, 1 for each request: mixed rows",
        "warning: look here",
    ]


def test_a_capture_retries_the_proof_that_found_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = compiled()
    with torch.no_grad():
        model(torch.randn(3, 4))
        (runner,) = runners_of(model)
        monkeypatch.setattr(type(runner.device), "spare_bytes", lambda self: 0)
        for _ in range(3):
            model(torch.randn(3, 4))
        assert runner.padding.refused
        monkeypatch.undo()
        graphcap.capture(model, inputs)
        assert not runner.padding.refused
        with graphcap.allow_capture(False):
            replays = runner.stats.replays
            x = torch.randn(3, 4)
            assert torch.allclose(model(x), model.linear(x), atol=1e-6)
        assert runner.stats.replays == replays + 1


def test_state_is_put_back_where_nothing_is_captured() -> None:
    model = compiled()
    with torch.no_grad(), graphcap.allow_capture(False):
        graphcap.capture(model, inputs)
    assert model.calls.item() == 0


def test_state_is_put_back_where_everything_was_captured_before() -> None:
    model = compiled()
    with torch.no_grad():
        graphcap.capture(model, inputs)
        for num_tokens in (8, 4, 2):
            with graphcap.step(num_tokens=num_tokens, num_reqs=num_tokens):
                model(torch.randn(num_tokens, 4))
        graphcap.capture(model, inputs)
    assert model.calls.item() == 3


def test_a_size_unlike_the_others_is_captured_after_one_more_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    check, watched = Sharing.check, []

    def unlike(self: Sharing, slot: int, value: Any, given: Any) -> None:
        if value.shape[0] == 4 and self._seen.is_of_another_size:
            raise UnlikeOtherSizes("for the test")
        watched.append(value.shape[0])
        check(self, slot, value, given)

    monkeypatch.setattr(Sharing, "check", unlike)
    model = compiled()
    with torch.no_grad():
        summary = graphcap.capture(model, inputs)
        assert [key.num_tokens for key in summary.captured] == [8, 4, 2], summary
        assert 4 in watched
        x = torch.randn(4, 4)
        assert torch.allclose(model(x), model.linear(x))
    (region,) = graphcap.explain(model).regions
    assert sum(plan.replays for plan in region.plans) == 1
    assert not region.failures


@pytest.mark.parametrize(
    ("made", "shown"),
    [
        (None, "None"),
        (torch.ones(2, 4), "a Tensor"),
        ((torch.ones(2, 4),), "a tuple of 1"),
        ((torch.ones(2, 4), {}), "a Tensor as args"),
        (((torch.ones(2, 4),), None), "None as kwargs"),
        (((), {}, [1]), "a list as inputs of the step"),
        (((), {}, {}, 1), "a tuple of 4"),
    ],
)
def test_make_inputs_that_returns_something_else_is_refused(made: Any, shown: str) -> None:
    """A bare tensor would be taken apart into its rows."""
    with (
        torch.no_grad(),
        pytest.raises(StepError, match=rf"make_inputs returned {shown} .*8 tokens.*return \(x,\), {{}}"),
    ):
        graphcap.capture(compiled(), lambda key: made)
