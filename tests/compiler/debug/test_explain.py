"""``graphcap.explain()``: it finds the regions of whatever the user has in hand, counts right, and reads well."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcap
from graphcap.compiler import region
from graphcap.compiler.backend import graphcap as backend
from graphcap.compiler.debug.report import FusionReport, PieceReport, Report, SettingReport
from tests.compiler.debug.reports import plan, traffic
from tests.compiler.debug.reports import region as small_region
from tests.compiler.small import Mlp, Stack, compiled


@pytest.fixture(autouse=True)
def _no_regions() -> Iterator[None]:
    region.forget_regions()
    yield
    region.forget_regions()


def call(function: Any, times: int = 1, width: int = 8) -> None:
    with torch.no_grad():
        for _ in range(times):
            function(torch.ones(3, width))


def names(report: Report) -> list[str]:
    return [each.function for each in report.regions]


def double(x: Tensor) -> Tensor:
    return x * 2


def triple(x: Tensor) -> Tensor:
    return x * 3


class Halver:
    def __init__(self) -> None:
        self.by = 0.5

    def halve(self, x: Tensor) -> Tensor:
        return x * self.by


OPTIONS = {"compiler": "eager"}
PIECE = PieceReport("piece_0", "captured", "always", "", "", "", 2, (), "eager", 0.0, "", "", "", ())


# -- finding the regions of a target -----------------------------------------------------------------------------------


def test_without_an_argument_it_reports_everything() -> None:
    assert "nothing was compiled" in str(graphcap.explain())
    call(compiled(Stack()))
    call(torch.compile(double, backend=backend, options=OPTIONS))
    assert names(graphcap.explain()) == ["Stack.forward", "double"]


def test_a_module_finds_its_own_regions_only() -> None:
    one, other = compiled(Stack(1)), compiled(Stack(2))
    call(one)
    call(other)
    assert len(graphcap.explain(one).regions) == len(graphcap.explain(other).regions) == 1
    assert graphcap.explain(one).regions != graphcap.explain(other).regions


def test_an_instance_that_dynamo_serves_with_another_ones_graph_is_told_so() -> None:
    one, other = compiled(Stack(1)), compiled(Stack(1))
    call(one)
    call(other)
    assert [r.name for r in graphcap.explain().regions] == [graphcap.explain(one).regions[0].name]
    assert "traced for another Stack" in graphcap.explain(other).message
    assert graphcap.explain(one).regions[0].name in graphcap.explain(other).message


def test_the_result_of_torch_compile_and_the_original_find_the_same() -> None:
    model = Stack(1).eval()
    fast = torch.compile(model, backend=backend, options=OPTIONS)
    call(fast)
    assert graphcap.explain(fast).regions == graphcap.explain(model).regions != ()


def test_a_submodule_finds_the_region_that_it_is_part_of() -> None:
    model = compiled(Stack(2))
    call(model)
    assert names(graphcap.explain(model.layers[1])) == ["Stack.forward"]


def test_a_module_finds_a_function_that_computes_with_its_parameters() -> None:
    model = Mlp().eval()
    call(torch.compile(lambda x: model(x) + 1, backend=backend, options=OPTIONS), width=4)
    assert len(graphcap.explain(model).regions) == 1


class Draft(nn.Module):
    """A small model that has its first layer in common with a larger one."""

    def __init__(self, target: Stack) -> None:
        super().__init__()
        self.first = target.layers[0]
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))


@pytest.mark.parametrize("compile_one", [compiled, lambda m: graphcap.compile(m, compiler="eager")])
def test_models_with_a_layer_in_common_do_not_find_each_other(compile_one: Callable[[nn.Module], nn.Module]) -> None:
    target = Stack(2).eval()
    draft = Draft(target).eval()
    call(compile_one(target))
    call(compile_one(draft))
    assert names(graphcap.explain(target)) == ["Stack.forward"]
    assert names(graphcap.explain(draft)) == ["Draft.forward"]
    assert names(graphcap.explain(target.layers[0])) == ["Stack.forward", "Draft.forward"]


def test_instances_over_the_same_weights_have_graphs_of_their_own() -> None:
    one = Stack(1).eval()
    other = copy.deepcopy(one, {id(tensor): tensor for tensor in one.parameters()})
    for model in (one, other):
        call(graphcap.compile(model, compiler="eager"))
    assert len(graphcap.explain(one).regions) == len(graphcap.explain(other).regions) == 1
    assert graphcap.explain(one).regions != graphcap.explain(other).regions


def test_a_function_and_its_compiled_version_find_the_same() -> None:
    fast = torch.compile(double, backend=backend, options=OPTIONS)
    call(fast)
    call(torch.compile(triple, backend=backend, options=OPTIONS))
    assert names(graphcap.explain(double)) == names(graphcap.explain(fast)) == ["double"]


def test_a_bound_method_is_found() -> None:
    halver = Halver()
    call(torch.compile(halver.halve, backend=backend, options=OPTIONS))
    assert names(graphcap.explain(halver.halve)) == ["Halver.halve"]


def test_both_halves_of_a_graph_break_are_found() -> None:
    def broken(x: Tensor) -> Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    call(torch.compile(broken, backend=backend, options=OPTIONS))
    assert len(graphcap.explain(broken).regions) == 2


def test_what_graphcap_compile_returned_is_found() -> None:
    model = graphcap.compile(Stack(1).eval(), dynamic_arg_dims={"x": 0}, compiler="eager")
    fast = graphcap.compile(double, compiler="eager")
    call(model)
    call(fast)
    assert len(graphcap.explain(model).regions) == 1
    assert len(graphcap.explain(fast).regions) == 1


def test_a_decorated_instance_is_found() -> None:
    @graphcap.support_graph_compile(compiler="eager")
    class Decorated(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    model = Decorated()
    call(model)
    assert len(graphcap.explain(model).regions) == 1


# -- nothing to report -------------------------------------------------------------------------------------------------


def test_a_module_that_was_never_called_gets_the_fix() -> None:
    report = graphcap.explain(Stack(1))
    assert report.regions == ()
    assert "Stack was never called through graphcap" in str(report)
    assert ".generate()" in report.message
    assert "model.compile(backend='graphcap')" in report.message


def test_a_compiled_module_that_was_never_called_is_told_to_call_it() -> None:
    report = graphcap.explain(torch.compile(Stack(1), backend=backend))
    assert "no call of it has reached graphcap" in report.message


def test_calling_the_original_function_is_explained() -> None:
    assert "double itself stays eager" in graphcap.explain(double).message


def test_graphcap_compile_without_a_call_is_told_to_call_it() -> None:
    assert "was never called. Call it once" in graphcap.explain(graphcap.compile(Stack(1))).message


def test_settings_that_say_eager_are_named() -> None:
    model = graphcap.compile(Stack(1), enforce_eager=True)
    call(model)
    assert "enforce_eager" in graphcap.explain(model).message


@pytest.mark.parametrize("target", [3, "model", Stack])
def test_what_cannot_have_been_compiled_is_refused(target: Any) -> None:
    with pytest.raises(TypeError, match="graphcap: "):
        graphcap.explain(target)


# -- what is in a report -----------------------------------------------------------------------------------------------


def test_pieces_say_how_why_and_where() -> None:
    model = compiled(Stack())
    call(model)
    (only,) = graphcap.explain(model).regions
    assert [piece.kind for piece in only.pieces] == ["captured", "eager"] * 3 + ["captured"]
    assert [piece.twin_of for piece in only.pieces] == ["", "", "", "piece_1", "piece_2", "piece_1", ""]
    assert "scaled_dot_product_attention" in only.pieces[1].reason
    assert only.pieces[1].module_path == "layers.0"
    assert "small.py:" in only.pieces[1].source
    assert only.no_capture


def test_plans_replays_and_live_calls_are_counted() -> None:
    model = compiled(Stack(1), simulate=True)
    call(model, times=6)
    (only,) = graphcap.explain(model).regions
    assert len(only.plans) == 1
    assert only.replays + sum(only.live_calls.values()) + len(only.plans) == 6
    assert only.replays >= 3
    assert only.bindings["x"] == "copied"
    assert only.device == "simulated"
    assert "simulated device" in str(graphcap.explain(model))


def test_settings_carry_their_origin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHCAP_CUDAGRAPH_MODE", "NONE")
    model = compiled(Stack(1))
    call(model)
    report = graphcap.explain(model)
    settings = {each.name: each for each in report.regions[0].settings}
    assert (settings["compiler"].value, settings["compiler"].origin) == ("eager", "code")
    assert settings["cudagraph_mode"].origin == "env GRAPHCAP_CUDAGRAPH_MODE"
    assert settings["max_plans"].origin == "default"
    assert "cudagraph_mode=NONE (env GRAPHCAP_CUDAGRAPH_MODE)" in one_line(report)
    assert "max_plans" not in str(report)


def test_recompiles_name_the_guard() -> None:
    model = compiled(Mlp(), dynamic=False)
    with torch.no_grad():
        model(torch.randn(2, 4))
        model(torch.randn(3, 4))
    report = graphcap.explain(model)
    assert list(report.recompiles) == [report.regions[1].name]
    assert "expected 2, actual 3" in report.recompiles[report.regions[1].name]
    assert "expected 2, actual 3" in one_line(report)


def test_a_region_in_grad_mode_says_that_it_is_bypassed() -> None:
    model = compiled(Mlp())
    model(torch.randn(2, 4))
    assert "nothing of graphcap runs here" in one_line(graphcap.explain(model))


def test_a_size_in_the_key_names_its_input() -> None:
    model = compiled(Mlp(), dynamic=True)
    call(model, width=4)
    (only,) = graphcap.explain(model).regions
    assert list(only.key_sizes.values()) == ["x dim 0"]


def test_to_dict_is_json_and_holds_everything() -> None:
    model = compiled(Stack(), simulate=True, splitting_rules=[lambda node: False])
    call(model, times=5)
    report = graphcap.explain(model)
    again = json.loads(json.dumps(report.to_dict()))
    assert again["regions"][0]["pieces"][1]["reason"] == report.regions[0].pieces[1].reason
    assert again["regions"][0]["plans"][0]["replays"] == report.regions[0].plans[0].replays
    assert set(again["regions"][0]) == {field.name for field in dataclasses.fields(report.regions[0])}


def test_a_report_is_a_snapshot() -> None:
    model = compiled(Stack(1), simulate=True)
    call(model, times=4)
    before = graphcap.explain(model)
    call(model, times=2)
    assert before.regions[0].replays + 2 == graphcap.explain(model).regions[0].replays


# -- the table ---------------------------------------------------------------------------------------------------------


def one_line(report: Report) -> str:
    return " ".join(str(report).split())


def test_no_line_is_wider_than_110_columns_and_twins_collapse() -> None:
    model = compiled(Stack(12), simulate=True)
    call(model, times=5)
    text = str(graphcap.explain(model))
    assert max(map(len, text.splitlines())) <= 110
    assert "piece_1, 3, 5, ... (x12)" in text or "piece_1, 3, ... (x12)" in text
    assert "piece_13" not in text
    assert len(text.splitlines()) < 40


def test_a_fusion_names_its_places_and_how_many_pieces_share_it() -> None:
    model = compiled(Stack())
    call(model)
    report = graphcap.explain(model)
    fusion = FusionReport("add_rms_norm", 2, 1, ("/long/path/llama.py:72 (layers.3.norm): rewritten",), 30, "")
    piece = dataclasses.replace(report.regions[0].pieces[0], fusions=(fusion,))
    shown = dataclasses.replace(report, regions=(dataclasses.replace(report.regions[0], pieces=(piece,)),))
    text = one_line(shown)
    assert "add_rms_norm: 2 matches x30 in piece_0, 1 rewritten" in text
    assert "llama.py:72 (layers.3.norm)" in text
    assert "/long/path" not in text


def test_traffic_and_alerts_have_rows() -> None:
    model = compiled(Stack(1), simulate=True)
    call(model, times=4)
    report = graphcap.explain(model)
    assert "padding" not in str(report)
    seen = traffic({(3,): ((4,), 6), (5,): ((8,), 7), (99,): (None, 2)})
    busy = dataclasses.replace(report.regions[0], traffic=seen, alerts=("look at this",))
    text = one_line(dataclasses.replace(report, regions=(busy,)))
    assert "replays by rung of num_tokens: 8: 7, 4: 6" in text
    assert "27 of 80 tokens in replays (33.8%)" in text
    assert "no rung for 99: 2 calls" in text
    assert "alert look at this" in text


@pytest.mark.parametrize(
    ("policy", "lasts"),
    [("clone", ""), ("static", "until the next replay of the same shape"), ("ring:3", "later replay number 3 of")],
)
def test_outputs_that_do_not_last_are_named(policy: str, lasts: str) -> None:
    row = SettingReport("outputs", policy, "code")
    found = str(Report("model", (small_region("forward_0", settings=(row,), plans=(plan(8, 3.0),), pieces=(PIECE,)),)))
    named = [line for line in found.splitlines() if line.lstrip().startswith("outputs")]
    assert len(named) == (policy != "clone")
    assert all(policy in line and lasts in line for line in named)


def test_the_memory_that_only_the_graphs_take_is_told_from_what_is_shared() -> None:
    plans = (plan(8, 3.0), dataclasses.replace(plan(16, 5.0), shared_mib=4.0))
    assert "8.0 MiB (4.0 of it the graphs alone)" in str(
        Report("model", (small_region("forward_0", plans=plans, pieces=(PIECE,)),))
    )


def test_alerts_are_those_of_the_counters() -> None:
    model = compiled(Stack(1), simulate=True)
    call(model, times=4)
    assert graphcap.explain(model).regions[0].alerts == ()
    (runner,) = region.all_regions()[0].runners
    runner.stats.recaptures = 9
    assert "captured again 9 times" in graphcap.explain(model).regions[0].alerts[0]
    assert graphcap.explain(model).metrics()["graphcap_captures_total"] == 1
    assert graphcap.explain(model).metrics()["graphcap_capture_seconds_total"] > 0


def test_regions_of_models_that_are_gone_are_forgotten_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(region, "MAX_REGIONS", 4)
    kept = compiled(Mlp())
    call(kept, width=4)
    for _ in range(8):
        call(compiled(Mlp()), width=4)
        torch._dynamo.reset()
        gc.collect()
    assert len(region.all_regions()) <= 4
    assert names(graphcap.explain(kept))
