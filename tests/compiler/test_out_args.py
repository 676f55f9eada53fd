"""Live ops that write their result into a tensor which they are given: nothing is copied between two graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcap
from graphcap.compiler import backend, rules
from graphcap.compiler.region import Region, all_regions
from graphcap.cudagraph import GraphRunner


@torch.library.custom_op("graphcap_test_out::attend", mutates_args=("out",))
def attend(x: Tensor, out: Tensor) -> None:
    out.copy_(x * 2)


@attend.register_fake
def _(x: Tensor, out: Tensor) -> None:
    return None


LIBRARY = torch.library.Library("graphcap_test_out", "FRAGMENT")
LIBRARY.define("silent(Tensor x, Tensor out) -> ()")  # writes out, and its schema does not say so


@torch.library.impl(LIBRARY, "silent", "CompositeExplicitAutograd")
def _(x: Tensor, out: Tensor) -> None:
    out.copy_(x * 2)


@torch.library.register_fake("graphcap_test_out::silent")
def _(x: Tensor, out: Tensor) -> None:
    return None


class Decoder(nn.Module):
    def __init__(self, op: Any) -> None:
        super().__init__()
        self.op = op
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x * self.weight
        out = torch.empty_like(x)
        self.op(x, out)
        return out.sum(0) + 1, out


@pytest.fixture(autouse=True)
def _fresh_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "_declared", {})


def replayed(op: Any, compiler: str = "eager", **options: Any) -> tuple[Region, GraphRunner]:
    """Six calls against eager; returns the region and its runner."""
    model = Decoder(op).eval()
    fast = torch.compile(model, backend=backend.graphcap, options={"simulate": True, "compiler": compiler, **options})
    with torch.inference_mode():
        for _ in range(6):
            x = torch.randn(3, 4)
            for mine, theirs in zip(fast(x), model(x), strict=True):
                torch.testing.assert_close(mine, theirs)
    region = all_regions()[-1]
    (runner,) = region.runners
    assert runner.stats.replays == 3
    return region, runner


def test_a_live_op_writes_where_the_next_graph_reads() -> None:
    region, runner = replayed(torch.ops.graphcap_test_out.attend)
    assert [piece.kind for piece in region.pieces] == ["captured", "eager", "captured"]
    (plan,) = runner.stats.plans
    assert "copy_(v" not in plan.source
    assert plan.num_segments == 2


def test_what_a_schema_does_not_say_is_declared() -> None:
    graphcap.register_op("graphcap_test_out::silent", capture="never", out_args=("out",))
    region, _ = replayed(torch.ops.graphcap_test_out.silent)
    (live,) = [piece for piece in region.pieces if piece.kind == "eager"]
    assert live.mutates == ("out",)


@pytest.mark.parametrize("mode", ["PIECEWISE", "FULL"])
def test_an_op_with_undeclared_writes_is_captured_without_being_compiled(mode: str) -> None:
    graphcap.register_op("graphcap_test_out::silent", capture="always", out_args=("out",))
    region, runner = replayed(torch.ops.graphcap_test_out.silent, compiler="inductor", cudagraph_mode=mode)
    piece = next(piece for piece in region.pieces if "schema" in piece.reason)
    assert (piece.kind, piece.origin) == ("captured", "eager")
    stats = runner.stats
    assert stats.plans[0].num_segments == 1
    assert not stats.divergences
    assert not stats.unchecked


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_a_declared_op_is_captured_and_compared_once(compiler: str) -> None:
    graphcap.register_op(attend, capture="always")
    _, runner = replayed(torch.ops.graphcap_test_out.attend, compiler)
    stats = runner.stats
    assert stats.plans[0].num_segments == 1
    assert not stats.unchecked
    assert runner.inspector.proven == {"graphcap_test_out::attend"}


def test_an_op_for_uniform_batches_runs_live_where_nobody_said_that_the_batch_is_uniform() -> None:
    graphcap.register_op(attend, capture="uniform_batch")
    _, runner = replayed(torch.ops.graphcap_test_out.attend, cudagraph_mode="FULL")
    (plan,) = runner.stats.plans
    assert list(plan.live.values()) == ["graphcap_test_out::attend is registered with capture='uniform_batch'"]
    assert "uniform only" in str(graphcap.explain())


def test_the_report_names_what_differed_and_what_was_not_compared() -> None:
    graphcap.register_op(attend, capture="always")
    region, runner = replayed(torch.ops.graphcap_test_out.attend)
    stats = runner.stats
    stats.divergences.append("piece_1: result 0 of a replay differs from a live run")
    stats.unchecked["ns::other"] = "it writes into 9000 MiB"
    report = next(each for each in graphcap.explain().regions if each.name == region.name)
    assert report.divergences == ("piece_1: result 0 of a replay differs from a live run",)
    assert report.unchecked == {"ns::other": "it writes into 9000 MiB"}
    text = str(graphcap.explain())
    assert "  diverged      piece_1: result 0 of a replay differs" in text
    assert "  unchecked     ns::other was not compared with a live run: it writes into 9000 MiB" in text


SCALE = {"now": 1.0}


@torch.library.custom_op("graphcap_test_out::scaled", mutates_args=())
def scaled(x: Tensor) -> Tensor:
    return x * SCALE["now"]


@scaled.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@pytest.mark.gpu
@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_an_op_that_was_declared_wrongly_is_found_on_a_gpu(compiler: str) -> None:
    graphcap.register_op(scaled, capture="always")

    def model(x: Tensor) -> Tensor:
        return torch.relu(torch.ops.graphcap_test_out.scaled(x + 1)) * 2

    fast = torch.compile(model, backend=backend.graphcap, options={"compiler": compiler})
    with torch.inference_mode():
        for call in range(8):
            SCALE["now"] = 1.0 + call
            x = torch.randn(4, 8, device="cuda")
            torch.testing.assert_close(fast(x), model(x))
    (report,) = graphcap.explain(fast).regions
    assert "graphcap_test_out::scaled" in report.divergences[0]
