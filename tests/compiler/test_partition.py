"""How the nodes of a graph are grouped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._dynamo import mark_dynamic

from graphcap.compiler import nodes
from graphcap.compiler.eager_functions import eager
from graphcap.compiler.rules import op_name
from tests.compiler.graphs import groups_of, kinds, trace


@eager
def live(x: Tensor) -> Tensor:
    return x * 3


@eager
def live_pair(x: Tensor) -> tuple[Tensor, Tensor]:
    return x * 3, x + 1


X = torch.randn(4, 6)


def cut_at(*names: str) -> Any:
    """A split rule for calls by their plain name."""

    def rule(node: fx.Node) -> bool:
        return op_name(node.target).rpartition(".")[2].rpartition("::")[2] in names

    return rule


def test_neighbours_of_one_kind_merge() -> None:
    groups = groups_of(trace(lambda x: live(live((x + 1) * 2)) + 1, X))
    assert kinds(groups) == ["captured", "eager", "captured"]
    assert [len(g.nodes) for g in groups] == [2, 2, 1]


def test_a_merged_group_gives_each_reason_once() -> None:
    (_, group, _) = groups_of(
        trace(lambda x: torch.tanh(torch.sin(torch.sin(x + 1))) + 1, X), rules=[cut_at("sin", "tanh")]
    )
    assert group.reason == "user rule rule"


def test_a_graph_without_a_rule_is_one_captured_group() -> None:
    assert kinds(groups_of(trace(lambda x: (x + 1) * 2, X))) == ["captured"]


def test_an_empty_graph_has_no_group() -> None:
    gm = trace(lambda x: x + 1, X)
    for node in reversed(list(gm.graph.nodes)):
        if node.op == "call_function":
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
    assert groups_of(gm) == []


def test_getitem_of_a_live_tuple_is_in_the_live_group() -> None:
    def f(x: Tensor) -> Tensor:
        first, second = live_pair(x + 1)
        return second * first

    groups = groups_of(trace(f, X))
    assert kinds(groups) == ["captured", "eager", "captured"]
    assert [node.op for node in groups[1].nodes] == ["call_function"] * 3


def test_getitem_far_behind_its_tuple_is_moved_to_it() -> None:
    def f(x: Tensor) -> Tensor:
        values, indices = torch.topk(x, 2)
        y = values * 2
        for _ in range(3):
            y = y + 1
        return y * indices

    gm = trace(f, X)
    getitem = [n for n in gm.graph.nodes if n.op == "call_function" and n.name.startswith(("indices", "getitem_1"))][-1]
    producer = getitem.args[0]
    last = next(n for n in reversed(gm.graph.nodes) if n.op != "output")
    last.prepend(getitem)  # as a graph that was rewritten may have it
    groups = groups_of(gm, rules=[cut_at("topk")])
    assert [producer in g.nodes for g in groups] == [getitem in g.nodes for g in groups]


@pytest.mark.parametrize("shape_op", [lambda x: x.transpose(0, 1), lambda x: x.view(2, 12)[0], lambda x: x.T])
def test_views_between_two_cut_groups_make_no_piece_of_their_own(shape_op: Any) -> None:
    assert kinds(groups_of(trace(lambda x: live(shape_op(live(x + 1))) + 1, X))) == ["captured", "eager", "captured"]


@pytest.mark.parametrize(
    "work",
    [lambda x: x.transpose(0, 1).contiguous(), lambda x: x.add_(1), lambda x: x + 1],
    ids=["copy", "in place", "new"],
)
def test_work_between_two_cut_groups_stays_captured(work: Any) -> None:
    groups = groups_of(trace(lambda x: live(work(live(x + 1))) + 1, X))
    assert kinds(groups) == ["captured", "eager", "captured", "eager", "captured"]


def test_vmap_is_not_cut_even_where_a_rule_matches_inside() -> None:
    gm = trace(lambda x: torch.vmap(lambda row: torch.sin(row + 1) * 2)(x) + 1, X)
    groups = groups_of(gm, rules=[cut_at("sin")])
    span = next(g for g in groups if any("increment_nesting" in n.name for n in g.nodes))
    assert any("decrement_nesting" in n.name for n in span.nodes)
    assert any(n.target is torch.sin for n in span.nodes)
    assert span.reason == "user rule rule"


def test_vmap_around_an_eager_function_is_not_compiled() -> None:
    """Inductor must not get to see the function, whatever else in the span could be compiled."""

    def f(x: Tensor, cache: Tensor) -> Any:
        cache = torch.cat([cache, x])
        y = cache
        for _ in range(6):
            y = torch.sin(y)
        return torch.vmap(lambda row: live(row) + row.sum())(y), cache

    cache = torch.randn(5, 6)
    mark_dynamic(cache, 0)
    groups = groups_of(trace(f, X, cache))
    span = next(g for g in groups if any("increment_nesting" in n.name for n in g.nodes))
    assert any("live" in n.name for n in span.nodes)
    assert span.verdict.kind == "eager"


def growing(num_extra: int) -> Any:
    def f(x: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        cache = torch.cat([cache, x])
        y = cache
        for _ in range(num_extra):
            y = torch.sin(y)
        return x.sum() + y.sum(), cache

    return f


def test_a_handful_of_live_operations_runs_as_it_is() -> None:
    cache = torch.randn(5, 6)
    mark_dynamic(cache, 0)
    assert "compiled" not in kinds(groups_of(trace(growing(0), X, cache)))


def test_a_long_run_of_live_operations_is_compiled() -> None:
    cache = torch.randn(5, 6)
    mark_dynamic(cache, 0)
    assert "compiled" in kinds(groups_of(trace(growing(6), X, cache)))


def test_autocast_is_in_no_group_and_cuts_nothing() -> None:
    def f(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = x @ x.T
        return y + 1

    (group,) = groups_of(trace(f, X))
    assert not any("autocast" in n.name for n in group.nodes)


def test_sdpa_backend_choice_stays_in_front_of_its_attention() -> None:
    def f(q: Tensor) -> Tensor:
        q = q + 1
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            q = F.scaled_dot_product_attention(q, q, q)
        return q + 1

    gm = trace(f, torch.randn(1, 1, 4, 8))
    order = [n for n in gm.graph.nodes if n.op == "call_function"]
    groups = groups_of(gm)
    assert kinds(groups) == ["captured", "eager", "captured"]
    assert [n for g in groups for n in g.nodes] == [n for n in order if n in {m for g in groups for m in g.nodes}]


def test_size_arithmetic_is_in_no_group() -> None:
    x = torch.randn(4, 6)
    mark_dynamic(x, 0)
    (group,) = groups_of(trace(lambda x: x.reshape(x.shape[0] * 2, -1) + 1, x))
    assert all(n.meta["example_value"] is not None for n in group.nodes)
    assert not any(isinstance(n.meta["example_value"], torch.SymInt) for n in group.nodes)


def test_a_size_that_is_returned_gets_a_last_group() -> None:
    x = torch.randn(4, 6)
    mark_dynamic(x, 0)
    gm = trace(lambda x: (live(x + 1), x.shape[0] * 2), x)
    *_, last = groups_of(gm)
    assert [isinstance(n.meta["example_value"], torch.SymInt) for n in last.nodes] == [True]
    assert not last.verdict.compiled


def test_a_size_read_from_a_tensor_is_read_from_the_input_instead() -> None:
    x = torch.randn(4, 6)
    mark_dynamic(x, 0)

    def f(x: Tensor) -> Tensor:
        y = live(x * 2)
        return y.view(y.size(0), 3, 2) + 1

    gm = trace(f, x)
    groups_of(gm)
    assert not any(n.op == "call_method" and n.target == "size" for n in gm.graph.nodes)


def test_order_of_effects_never_changes() -> None:
    def f(x: Tensor) -> Tensor:
        y = x + 1
        y.mul_(2)
        z = live(y)
        y.add_(1)
        return z + y

    gm = trace(f, X)
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    groups = groups_of(gm)
    grouped = [order[n] for g in groups for n in g.nodes]
    assert grouped == sorted(grouped)


def test_a_tensor_has_one_name_however_often_it_is_written() -> None:
    """``x.add_(1)`` returns ``x``: a piece that took both would be compiled for one tensor and be given two."""

    def f(x: Tensor) -> Tensor:
        y = x + 1
        z = live(y).add_(y)
        w = z.mul_(2).contiguous()
        return live(w) + z + w

    gm = trace(f, X)
    groups_of(gm)
    assert {n.target for n in gm.graph.nodes if n.op == "call_method" and not n.users} == {"add_", "mul_", "contiguous"}


def test_what_an_eager_function_says_to_return_is_not_taken_for_its_argument() -> None:
    """A ``fake`` that returns its argument tells a shape, not an identity."""

    @eager(fake=lambda x: x)
    def scaled(x: Tensor) -> Tensor:
        return x * 2

    gm = trace(lambda x: scaled(x + 1) + 1, X)
    groups_of(gm)
    (call,) = [n for n in gm.graph.nodes if "scaled" in n.name]
    assert len(call.users) == 1


@pytest.mark.parametrize(("name", "changes"), [("__eq__", False), ("add_", False), ("unsqueeze_", True)])
def test_which_methods_change_the_form_of_a_tensor(name: str, changes: bool) -> None:
    """``torch.ops.aten`` has an ``__eq__`` as every object has, which is no operator."""
    graph = fx.Graph()
    assert nodes.changes_form_in_place(graph.call_method(name, (graph.placeholder("x"), 0))) is changes
