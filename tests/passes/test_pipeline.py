from __future__ import annotations

import logging
import operator
import secrets
from typing import Any

import pytest
import torch
from torch import fx

from graphcap.errors import ConfigError, PassRequiredError
from graphcap.passes import GraphPass, PassPipeline, PassResult
from graphcap.passes.add_rms_norm import AddRmsNorm


def graph_of_two() -> fx.Graph:
    """``(a + b) * a`` on placeholders with no metadata."""
    graph = fx.Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    graph.output(graph.call_function(operator.mul, (graph.call_function(operator.add, (a, b)), a)))
    return graph


class AddToSub(GraphPass):
    name = "add_to_sub"

    def __call__(self, graph: fx.Graph) -> PassResult:
        adds = graph.find_nodes(op="call_function", target=operator.add)
        for node in adds:
            node.target = operator.sub
        return PassResult(self.name, matches=len(adds), replaced=len(adds))


class HalfWay(GraphPass):
    """Tears the graph apart, then fails."""

    name = "half_way"

    def __call__(self, graph: fx.Graph) -> PassResult:
        for node in graph.find_nodes(op="call_function", target=operator.mul):
            node.args = (node.args[1], 3)
        graph.erase_node(graph.find_nodes(op="call_function", target=operator.add)[0])
        with graph.inserting_before(graph.output_node()):
            graph.call_function(operator.neg, (graph.find_nodes(op="placeholder", target="b")[0],))
        raise RuntimeError("lost the thread")


class BrokenOrder(GraphPass):
    """Leaves a graph that does not lint: a node reads one that comes later."""

    name = "broken_order"

    def __call__(self, graph: fx.Graph) -> PassResult:
        add = graph.find_nodes(op="call_function", target=operator.add)[0]
        add.args = (graph.find_nodes(op="call_function", target=operator.mul)[0], 1)
        return PassResult(self.name, matches=1, replaced=1)


class Silent(GraphPass):
    name = "silent"

    def __call__(self, graph: fx.Graph) -> Any:
        return None


def run(pipeline: PassPipeline, graph: fx.Graph) -> dict[str, PassResult]:
    pipeline(graph)
    return {result.name: result for result in pipeline.results}


def test_each_pass_is_counted_and_shown_before_and_after() -> None:
    result = run(PassPipeline(extra=[AddToSub()]), graph_of_two())["add_to_sub"]
    assert (result.matches, result.replaced, result.nodes_before, result.nodes_after) == (1, 1, 5, 5)
    assert result.seconds > 0
    assert result.before is not None
    assert result.after is not None
    assert "a + b" in result.before
    assert "a - b" in result.after


def test_a_pass_that_changed_nothing_keeps_no_text() -> None:
    result = run(PassPipeline(), graph_of_two())["add_rms_norm"]
    assert (result.matches, result.before, result.after) == (0, None, None)


@pytest.mark.parametrize("failing", [HalfWay(), BrokenOrder(), Silent()], ids=lambda stage: stage.name)
def test_a_failing_pass_leaves_the_graph_intact(failing: GraphPass, caplog: pytest.LogCaptureFixture) -> None:
    graph = graph_of_two()
    before = str(graph)
    with caplog.at_level(logging.WARNING, "graphcap.passes"):
        results = run(PassPipeline(extra=[failing, AddToSub()]), graph)
    assert results[failing.name].error
    assert results[failing.name].replaced == 0
    assert failing.name in caplog.text
    # The next pass found the graph as it was, in a graph that can still be edited and run.
    assert results["add_to_sub"].replaced == 1
    assert str(graph) == before.replace("operator.add", "operator.sub")
    graph.lint()
    assert fx.GraphModule({}, graph)(5, 2) == 15


def test_disabled_passes_do_not_run() -> None:
    results = run(PassPipeline(disable=["add_rms_norm", "add_to_sub"], extra=[AddToSub(), HalfWay()]), graph_of_two())
    assert set(results) == {"half_way"}


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"disable_passes: there is no pass 'add_rmsnorm'.*'add_rms_norm'"):
        PassPipeline(disable=["add_rmsnorm"])
    with pytest.raises(ConfigError, match=r"require_passes: there is no pass 'add_to_sub'"):
        PassPipeline(require=["add_to_sub"])
    PassPipeline(require=["add_to_sub"], extra=[AddToSub()])


def test_two_passes_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="same name: add_to_sub"):
        PassPipeline(extra=[AddToSub(), AddToSub()])


def test_a_required_pass_must_match_somewhere_in_the_region() -> None:
    pipeline = PassPipeline(require=["add_rms_norm"])
    nothing, something = PassResult("add_rms_norm"), PassResult("add_rms_norm", matches=1)
    pipeline.check_required([nothing, something])
    with pytest.raises(PassRequiredError, match="'add_rms_norm' matched nothing in 2 graphs"):
        pipeline.check_required([nothing, nothing, PassResult("another", matches=1)])
    with pytest.raises(PassRequiredError, match="it failed: KeyError: 'val'"):
        pipeline.check_required([PassResult("add_rms_norm", error="KeyError: 'val'")])
    with pytest.raises(PassRequiredError, match=r"'add_rms_norm' saw no graph: no piece .* went through Inductor"):
        pipeline.check_required([])


def test_disabling_wins_over_requiring(caplog: pytest.LogCaptureFixture) -> None:
    """The switch that disables comes from outside, to bisect a program without editing it."""
    pipeline = PassPipeline(disable=["add_rms_norm"], require=["add_rms_norm"])
    assert "add_rms_norm" in caplog.text
    pipeline.check_required([])


def test_fingerprint_follows_the_enabled_passes_and_the_salt_only_the_uuid() -> None:
    plain, disabled, extra = PassPipeline(), PassPipeline(disable=["add_rms_norm"]), PassPipeline(extra=[AddToSub()])
    assert len({pipeline.fingerprint() for pipeline in (plain, disabled, extra)}) == 3
    assert PassPipeline(require=["add_rms_norm"]).fingerprint() == plain.fingerprint()
    salted = PassPipeline()
    salted.salt = "1"
    assert salted.fingerprint() == plain.fingerprint()
    assert salted.uuid() != plain.uuid() == PassPipeline().uuid()


def test_order_of_passes_is_part_of_the_fingerprint() -> None:
    stages = [AddToSub(), HalfWay()]
    assert PassPipeline(extra=stages).fingerprint() != PassPipeline(extra=stages[::-1]).fingerprint()


def test_result_survives_json() -> None:
    result = PassResult("p", 2, 1, ("a.py:1: fused", "a.py:2: left"), 9, 7, 0.25, "before", "after", None)
    assert PassResult.from_dict(result.to_dict()) == result


class FusedOnCpu(AddRmsNorm):
    name = "fused_on_cpu"


def test_inductor_compiles_the_fused_op() -> None:
    def fn(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        new = residual + x
        return torch.nn.functional.rms_norm(new, weight.shape, weight, 1e-5).cos(), new

    pipeline = PassPipeline(disable=["add_rms_norm"], extra=[FusedOnCpu(rewrite_on=("cpu",))])
    pipeline.salt = secrets.token_hex(4)
    compiled = torch.compile(fn, options={"post_grad_custom_pre_pass": pipeline})
    with torch.no_grad():
        for rows in (3, 5):
            inputs = torch.randn(rows, 8), torch.randn(rows, 8), torch.randn(8)
            torch._dynamo.mark_dynamic(inputs[0], 0)
            torch._dynamo.mark_dynamic(inputs[1], 0)
            torch.testing.assert_close(compiled(*inputs), fn(*inputs))
    assert [result.replaced for result in pipeline.results] == [1]
    assert "graphcap.add_rms_norm" in str(pipeline.results[0].after)


def test_inductor_runs_the_pipeline_unless_its_own_cache_answers() -> None:
    """A fresh salt is what makes a miss in our store a real compile: same salt, Inductor's cache hides the passes."""

    def fn(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        new = residual + x
        return torch.nn.functional.rms_norm(new, weight.shape, weight, 1e-5), new

    def compile_with(salt: str) -> PassPipeline:
        torch._dynamo.reset()
        pipeline = PassPipeline()
        pipeline.salt = salt + run_id
        x = torch.ones(2, 8)
        with torch.no_grad():
            compiled = torch.compile(fn, options={"post_grad_custom_pre_pass": pipeline})
            torch.testing.assert_close(compiled(x, x, x[0]), fn(x, x, x[0]))
        return pipeline

    run_id = secrets.token_hex(4)  # the developer's Inductor cache may outlive this run
    first = compile_with("first")
    assert [(result.name, result.matches, result.replaced) for result in first.results] == [("add_rms_norm", 1, 0)]
    assert compile_with("first").results == []
    assert len(compile_with("second").results) == 1
