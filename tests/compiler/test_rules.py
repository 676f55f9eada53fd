"""Which operations are cut out, in every spelling that models use, and which may be captured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_mutation
from torch.nn.attention.flex_attention import flex_attention

from graphcap.compiler import rules
from graphcap.compiler.eager_functions import eager
from graphcap.compiler.rules import SplitRules, never_captured, op_name, register_op, undeclared_writes, unproven
from graphcap.cudagraph import Capture
from graphcap.errors import ConfigError
from tests.compiler.graphs import call_nodes, groups_of, in_backend, kinds, trace

Q = torch.randn(1, 2, 4, 8)
DEFAULT = SplitRules.of(None, ())


@torch.library.custom_op("graphcap_test_rules::attend", mutates_args=())
def attend(x: Tensor) -> Tensor:
    return x * 2


@attend.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("graphcap_test_rules::unsafe", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def unsafe(x: Tensor) -> Tensor:
    return x + 1


@unsafe.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@eager
def by_hand(x: Tensor) -> Tensor:
    return x * 3


def reads_a_value(x: Tensor) -> Tensor:
    return x * float(x.sum())


live_with_fake = eager(fake=torch.empty_like)(reads_a_value)


@pytest.fixture(autouse=True)
def _fresh_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "_declared", {})


def matches(ops: list[str] | None, node: fx.Node) -> bool:
    return SplitRules.of(ops, ()).match(node) is not None


def only_match(gm: fx.GraphModule, split_rules: SplitRules = DEFAULT) -> fx.Node:
    (node,) = [n for n in gm.graph.nodes if n.op.startswith("call") and split_rules.match(n)]
    return node


def test_sdpa_is_cut_as_the_builtin_that_models_call() -> None:
    node = only_match(trace(lambda q: F.scaled_dot_product_attention(q, q, q) + 1, Q))
    assert DEFAULT.match(node) == "splitting op aten::scaled_dot_product_attention"
    assert never_captured(node) is None


def test_sdpa_is_cut_as_an_aten_op() -> None:
    node = only_match(trace(lambda q: torch.ops.aten.scaled_dot_product_attention(q, q, q) + 1, Q))
    assert op_name(node.target) == "aten::scaled_dot_product_attention"


def test_sdpa_is_cut_as_an_aten_overload() -> None:
    node = only_match(trace(lambda q: torch.ops.aten.scaled_dot_product_attention.default(q, q, q) + 1, Q))
    assert op_name(node.target) == "aten::scaled_dot_product_attention"


def test_flex_attention_is_cut_and_compiled_and_may_be_captured() -> None:
    gm = trace(lambda q: flex_attention(q + 1, q, q) * 2, Q)
    assert op_name(only_match(gm).target) == "higher_order::flex_attention"
    _before, attention, _after = groups_of(gm)
    assert attention.verdict.compiled
    assert attention.verdict.capture.value == "full"


@pytest.mark.parametrize(
    ("rule", "hit"),
    [
        ("graphcap_test_rules::attend", True),
        ("graphcap_test_rules::attend.default", True),
        ("graphcap_test_rules::*", True),
        ("graphcap_test_rules::attend.other", False),
        ("graphcap_test_rules::att", False),
        ("graphcap_test::*", False),
    ],
)
def test_custom_op_is_cut_by_name_by_overload_and_by_namespace(rule: str, hit: bool) -> None:
    (node,) = call_nodes(trace(lambda x: attend(x) + 1, Q), "attend")
    assert matches([rule], node) is hit


@pytest.mark.parametrize(
    "softmax",
    [lambda x: torch.softmax(x, -1), lambda x: F.softmax(x, -1), lambda x: x.softmax(-1)],
    ids=["torch", "functional", "method"],
)
def test_an_aten_name_covers_the_python_spellings(softmax: Any) -> None:
    (node,) = call_nodes(trace(softmax, Q), "softmax")
    assert matches(["aten::softmax"], node)
    assert not matches(["aten::soft"], node)


def test_an_aten_name_covers_the_operator() -> None:
    (node,) = call_nodes(trace(lambda x: x @ x.transpose(-1, -2), Q), "matmul")
    assert matches(["aten::matmul"], node)


def test_a_python_function_is_cut_by_its_path() -> None:
    (node,) = call_nodes(trace(lambda x: F.softmax(x, -1), Q), "softmax")
    assert matches(["torch.nn.functional.softmax"], node)


def test_user_predicate_is_cut_and_named() -> None:
    def every_relu(node: fx.Node) -> bool:
        return node.target is torch.relu

    gm = trace(lambda x: torch.relu(x + 1) + 1, Q)
    groups = groups_of(gm, rules=[every_relu])
    assert [g.reason for g in groups] == ["", "user rule every_relu", ""]


def test_custom_op_runs_live_until_it_is_declared() -> None:
    (node,) = call_nodes(trace(lambda x: attend(x) + 1, Q), "attend")
    assert "register_op('graphcap_test_rules::attend'" in (never_captured(node) or "")
    register_op("graphcap_test_rules::attend", capture="always")
    assert never_captured(node) is None


@pytest.mark.parametrize(
    "op",
    [
        "graphcap_test_rules::attend",
        attend,
        torch.ops.graphcap_test_rules.attend,
        torch.ops.graphcap_test_rules.attend.default,
    ],
    ids=["name", "custom_op", "packet", "overload"],
)
def test_register_op_takes_every_way_to_name_an_op(op: Any) -> None:
    (node,) = call_nodes(trace(lambda x: attend(x) + 1, Q), "attend")
    register_op(op, capture="always")
    assert never_captured(node) is None
    register_op(op, capture="never")
    assert never_captured(node) == "graphcap_test_rules::attend is registered with capture='never'"


@pytest.mark.parametrize("op", ["attend", "a::b::c", len, 3])
def test_register_op_refuses_what_names_no_op(op: Any) -> None:
    with pytest.raises(ConfigError, match="names no operator"):
        register_op(op, capture="always")


def test_register_op_refuses_an_unknown_policy() -> None:
    with pytest.raises(ConfigError, match="valid are: 'always', 'uniform_batch'"):
        register_op("a::b", capture="sometimes")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("policy", "kind"), [("uniform_batch", Capture.UNIFORM), ("uniform_single_token", Capture.UNIFORM_SINGLE)]
)
def test_an_op_for_uniform_batches_is_cut_out_and_says_when_it_is_captured(policy: Any, kind: Capture) -> None:
    gm = trace(lambda x: attend(attend(x) + 1) + 1, Q)
    register_op(attend, capture=policy)
    first, _, second, _ = groups_of(gm)
    assert first.verdict.capture is second.verdict.capture is kind
    assert first.reason == f"graphcap_test_rules::attend is registered with capture={policy!r}"


def test_a_condition_is_stricter_than_a_split_rule() -> None:
    gm = trace(lambda x: attend(x) + 1, Q)
    register_op(attend, capture="uniform_batch")
    assert groups_of(gm, ops=["graphcap_test_rules::attend"])[0].verdict.capture is Capture.UNIFORM


def test_what_is_captured_on_somebody_s_word_is_unproven() -> None:
    (node,) = call_nodes(trace(lambda x: attend(x) + 1, Q), "attend")
    assert unproven(node) is None  # it runs live
    register_op(attend, capture="always")
    assert unproven(node) == "graphcap_test_rules::attend"
    register_op(attend, capture="never")
    assert unproven(node) is None
    assert not any(unproven(n) for n in trace(lambda q: F.scaled_dot_product_attention(q, q, q) + 1, Q).graph.nodes)


def test_a_triton_kernel_is_unproven() -> None:
    graph = fx.Graph()
    node = graph.call_function(triton_kernel_wrapper_mutation, kwargs={"kernel_idx": 12345})
    assert unproven(node) == "triton kernel 12345"


def test_out_args_must_be_arguments_of_the_op() -> None:
    with pytest.raises(ConfigError, match="attend has no argument 'y'"):
        register_op(attend, capture="never", out_args=("y",))
    with pytest.raises(ConfigError, match="a sequence of argument names"):
        register_op(attend, capture="never", out_args="x")
    register_op("graphcap_test_rules::registered_later", capture="never", out_args=("anything",))


def test_writes_are_undeclared_only_where_the_called_overload_has_the_argument_and_does_not_mark_it() -> None:
    register_op("aten::add", capture="always", out_args=("out", "self"))
    graph = fx.Graph()
    x = graph.placeholder("x")
    assert undeclared_writes(graph.call_function(torch.ops.aten.add.Tensor, (x, x))) == ("self",)
    assert undeclared_writes(graph.call_function(torch.ops.aten.add_.Tensor, (x, x))) == ()
    assert undeclared_writes(graph.call_function(torch.ops.aten.add, (x, x))) == ("self",)
    assert undeclared_writes(graph.call_function(torch.ops.aten.add.out, (x, x), {"out": x})) == ("self",)


def test_op_tagged_cudagraph_unsafe_runs_live() -> None:
    (node,) = call_nodes(trace(lambda x: unsafe(x) + 1, Q), "unsafe")
    assert "tagged cudagraph_unsafe" in (never_captured(node) or "")


def test_eager_function_is_one_live_node_of_the_graph() -> None:
    gm = trace(lambda x: by_hand(x + 1) + 1, Q)
    groups = groups_of(gm)
    assert kinds(groups) == ["captured", "eager", "captured"]
    assert groups[1].reason.startswith("@graphcap.eager function tests.compiler.test_rules.by_hand")


def test_eager_function_with_a_fake_is_traced_without_running_its_body() -> None:
    gm = trace(lambda x: live_with_fake(x + 1) + 1, Q)
    assert kinds(groups_of(gm)) == ["captured", "eager", "captured"]


def test_eager_function_with_a_fake_runs_its_body_on_real_tensors() -> None:
    assert torch.equal(live_with_fake(Q), reads_a_value(Q))


def test_eager_keeps_the_function_s_name_and_works_outside_a_trace() -> None:
    assert by_hand.__name__ == "by_hand"
    assert torch.equal(by_hand(Q), Q * 3)


def test_eager_on_an_op_is_register_op_never() -> None:
    assert eager(attend) is attend
    (node,) = call_nodes(trace(lambda x: attend(x) + 1, Q), "attend")
    assert never_captured(node) == "graphcap_test_rules::attend is registered with capture='never'"


@pytest.mark.parametrize(
    "fn", [lambda x: x.cpu() + 1, lambda x: x.sum().item(), lambda x: x.nonzero()], ids=["cpu", "item", "nonzero"]
)
def test_ops_that_hand_data_to_the_host_are_never_captured(fn: Any) -> None:
    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        gm = trace(fn, Q)
    assert any("hands data to the host" in (never_captured(n) or "") for n in gm.graph.nodes if n.op.startswith("call"))


def test_a_tuple_of_ops_replaces_the_built_in_list() -> None:
    gm = trace(lambda q: F.scaled_dot_product_attention(q, q, q).relu() + 1, Q)
    assert kinds(groups_of(gm, ops=())) == ["captured"]
    cut, _ = groups_of(trace(lambda q: q.relu() + 1, Q), ops=["aten::relu"])
    assert cut.reason == "splitting op aten::relu"


def test_dynamo_never_compiles_the_body_even_where_the_trace_breaks_at_it() -> None:
    """Without a ``fake`` a function that reads values cannot be in a graph; it still runs as it is."""
    compiling: list[bool] = []

    @eager
    def reads(x: Tensor) -> Tensor:
        compiling.append(torch.compiler.is_compiling())
        return x * float(x.sum())

    graphs = in_backend(lambda gm, _: len(call_nodes(gm, "")), lambda x: reads(x + 1) * 2, Q)
    assert graphs == [1, 1]
    assert compiling[-1] is False
