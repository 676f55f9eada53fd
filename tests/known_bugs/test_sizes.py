"""Bugs of sizes: too many graphs, graphs for the wrong size, batches that no graph serves, metadata of another size."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.library import custom_op

import graphcap
from tests.known_bugs.models import SETTINGS, WIDTH, Beside, Mlp, rows


@pytest.fixture(autouse=True)
def _same_weights() -> None:
    torch.manual_seed(0)


def test_only_sizes_that_come_are_captured() -> None:
    """Field notes row 8: capturing every size of the ladder dominates the start. Here each is captured on first use."""
    both = Beside(Mlp(), {"x": 0})
    for _ in range(4):
        for n in (3, 19):
            both(rows(n))
    assert sorted(plan.key for plan in both.plans) == [(4,), (24,)], "of 51 sizes of the default ladder"


class Branches(nn.Module):
    """Takes other ways for other sizes, in Python and in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.few, self.many = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.few if x.shape[0] < 5 else self.many
        return chosen(x) * x.shape[0] if x.shape[0] % 3 else chosen(x) - 1


@pytest.mark.parametrize("guards", ["full", "sealed"])
def test_a_branch_on_the_size_holds_for_every_size(guards: str) -> None:
    """Field notes row 9: one trace serves all sizes, its guards are dropped, other sizes are silently wrong."""
    both = Beside(Branches(), {"x": 0}, guards=guards, capture_sizes=[4, 8])
    for _ in range(4):
        for n in (7, 2, 6, 4, 5, 3, 8):
            both(rows(n))
    assert both.replays > 0


@pytest.mark.parametrize("capture_sizes", [[4, 8, 16], [4, 5, 8, 16], [3, 7, 16]])
def test_speculative_decoding_has_rungs_of_whole_requests(capture_sizes: list[int]) -> None:
    """Field notes row 14: a ladder of tokens cuts requests apart, and one size more or less sends decode to eager."""
    both = Beside(Mlp(), {"x": 0}, capture_sizes=capture_sizes, cudagraph_mode="FULL_AND_PIECEWISE", num_warmups=1)
    query_len = 3
    for _ in range(5):
        for reqs in range(1, 6):
            with graphcap.step(num_tokens=reqs * query_len, num_reqs=reqs, uniform_query_len=query_len):
                both(rows(reqs * query_len))
    assert all(plan.key[0] % query_len == 0 and plan.mode == "FULL" for plan in both.plans), both.plans
    assert max(plan.key[0] for plan in both.plans) >= 5 * query_len
    live = both.region.live_calls
    assert set(live) == {"warm-up"}, "every batch is served by a graph"


def test_batches_that_no_rung_serves_are_counted_and_said(caplog: pytest.LogCaptureFixture) -> None:
    """Field notes row 14: batches that fall off the ladder run slowly, and nobody says so."""
    both = Beside(Mlp(), {"x": 0}, capture_sizes=[4])
    for _ in range(130):
        both(rows(9))
        both(rows(4))
    assert both.region.live_calls["above the ladder, which ends at 4"] == 130
    assert any("num_tokens=9 (130 calls)" in alert for alert in both.region.alerts), both.region.alerts
    assert any("num_tokens=9" in record.getMessage() for record in caplog.records)


seen: list[tuple[int, list[int]]] = []


@custom_op("known_bugs::attend", mutates_args=())
def attend(x: Tensor) -> Tensor:
    lens = graphcap.current_step().inputs["lens"]
    seen.append((len(x), lens.tolist()))
    return x * lens.repeat_interleave(len(x) // len(lens))[:, None]


@attend.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(attend(self.inner(x)))


@pytest.mark.parametrize("mode", ["FULL", "FULL_AND_PIECEWISE"])
def test_metadata_is_of_the_padded_size(mode: str) -> None:
    """Field notes row 15: metadata is built, then the batch is padded, and the two do not fit.

    The decision comes before the call, and what the op reads in a replay is of the size that it said.
    """
    dims = {"x": {0: "num_tokens"}, "step.lens": {0: "num_reqs"}}
    both = Beside(Attends(), dims, cudagraph_mode=mode, capture_sizes=[4, 8])
    for call in range(24):
        reqs = (3, 4, 2, 5)[call % 4]
        lens = torch.randint(1, 9, (reqs,))
        decision = graphcap.dispatch(both.fast, num_tokens=reqs, num_reqs=reqs, uniform_query_len=1)
        before = both.replays
        with graphcap.step(dispatch=decision, inputs={"lens": lens}):
            both(rows(reqs))
        tokens, found = seen[-1]
        assert len(found) == tokens
        assert found[:reqs] == lens.tolist()
        if both.replays > before:
            assert (tokens, len(found)) == (decision.num_tokens, decision.num_reqs)
            assert found[reqs:] == [0] * (len(found) - reqs), "not what an earlier batch left"
    assert both.replays >= 10


def test_one_request_is_no_proof_for_several() -> None:
    """Field notes row 15: the op divides padded rows among real requests, which is right where there is but one."""
    dims = {"x": {0: "num_tokens"}, "step.lens": {0: "num_reqs"}}
    both = Beside(Attends(), dims, cudagraph_mode="PIECEWISE", capture_sizes=[4, 8, 16])
    lens = torch.arange(1, 6)
    for reqs in (1, 1, 1, 1, 2, 4, 3, 2, 4, 3, 5, 2, 1):
        with graphcap.step(num_tokens=3 * reqs, num_reqs=reqs, inputs={"lens": lens[:reqs]}):
            both(rows(3 * reqs))
    assert any("depends on the padded size" in note for note in both.region.notes)


def test_mixed_traffic_needs_a_bounded_number_of_graphs_and_bytes() -> None:
    """Field notes row 23: every new shape is traced and recorded, and memory grows without end."""
    both, sizes, held = Beside(Mlp(), {"x": 0}, max_capture_size=64), random.Random(0), []
    for call in range(400):
        both(rows(sizes.randint(1, 64)))
        if call % 100 == 99:
            held.append(sum(plan.mib for plan in both.plans))
    assert len(graphcap.explain(both.fast).regions) == 1, "one trace"
    assert len(both.plans) <= 11, "1, 2, 4, 8 and on by 8 to 64"
    assert held[-1] == held[-2], "memory is flat after the warm-up"
    assert both.replays >= 400 - 3 * 11


def test_undeclared_shapes_stop_at_the_limit() -> None:
    """Field notes row 23: without a ladder each shape would have a graph of its own."""
    both = Beside(Mlp(), None, max_plans=3, capture_after=2)
    for _ in range(4):
        for n in range(2, 12):
            both(rows(n))
    assert len(both.plans) == 3


@pytest.mark.parametrize(("specialized", "num_plans"), [((), 1), (("lora",), 2)])
def test_tags_multiply_graphs_only_where_asked_for_and_only_when_they_come(
    specialized: tuple[str, ...], num_plans: int
) -> None:
    """Field notes row 30: LoRA counts times sizes are captured, most of them for nothing."""
    both = Beside(Mlp(), {"x": 0}, capture_sizes=[4, 8, 16], specialize_tags=specialized)
    for call in range(12):
        with graphcap.step(num_tokens=4, tags={"lora": 3 * (call % 2), "request": call}):
            both(rows(4))
    assert len(both.plans) == num_plans


def options(**more: Any) -> dict[str, Any]:
    return {**SETTINGS, "capture_sizes": [4, 8], **more}


def test_declared_dims_on_the_way_of_torch_compile() -> None:
    """Field notes row 23: a model that nobody marked is traced once for its first size, and padded from the second."""
    model = Mlp()
    fast = torch.compile(model, backend="graphcap", options=options(dynamic_arg_dims={"x": 0}))
    with torch.no_grad():
        for n in (3, 5, 6, 7, 3, 4, 6, 5, 2, 3):
            x = rows(n)
            torch.testing.assert_close(fast(x), Mlp.forward(model, x))
    fixed, dynamic = graphcap.explain(fast).regions
    assert any("took the sizes of its first call as constants" in note for note in fixed.notes), fixed.notes
    assert {plan.key for plan in dynamic.plans} == {(4,), (8,)}
