"""What is said about entries of ``splitting_ops`` that cut nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphcap
from graphcap.compiler import region
from graphcap.compiler.split_names import why_nothing_matches

SDPA = "aten::scaled_dot_product_attention"


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q = self.proj(x)
        return self.proj(F.scaled_dot_product_attention(q, q, q))


@pytest.fixture(autouse=True)
def _no_regions() -> None:
    torch._dynamo.reset()
    region.forget_regions()


def report(*splitting_ops: str, model: nn.Module | None = None) -> graphcap.Report:
    model = graphcap.compile(model or Attention().eval(), splitting_ops=splitting_ops, compiler="eager")
    with torch.no_grad():
        model(torch.randn(2, 3, 4, 8))
    return graphcap.explain(model)


def notes(*splitting_ops: str) -> list[str]:
    (only,) = report(*splitting_ops).regions
    return [note for note in only.notes if note.startswith("splitting_ops")]


def test_what_cuts_is_not_mentioned() -> None:
    assert notes(SDPA) == []
    assert notes("aten::*") == []


def test_a_misspelled_operator_is_named_with_the_nearest() -> None:
    found = report("aten::scaled_dot_product_atention").regions[0]
    assert len(found.pieces) == 1, "attention is not cut"
    (note,) = found.notes
    assert note == (
        "splitting_ops: 'aten::scaled_dot_product_atention' cuts nothing: there is no such operator; did you mean "
        f"'{SDPA}'?"
    )


def test_an_operator_that_no_graph_has() -> None:
    assert notes(SDPA, "aten::cumsum") == ["splitting_ops: 'aten::cumsum' has matched nothing in any graph so far"]


def test_a_match_in_another_graph_with_these_settings_counts() -> None:
    class Cumsum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.cumsum(0) + 1

    assert len(notes(SDPA, "aten::cumsum")) == 1
    report(SDPA, "aten::cumsum", model=Cumsum())
    every = [note for each in graphcap.explain().regions for note in each.notes]
    assert not any(note.startswith("splitting_ops") for note in every)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("nolib::nop", "no operator of the namespace 'nolib' is registered; import the library first"),
        ("nolib::*", "no operator of the namespace 'nolib' is registered; import the library first"),
        ("aten::add.Tensr", "there is no such operator; did you mean 'aten::add.Tensor'?"),
        ("torch.nn.functional.softmx", "there is no such function; did you mean 'torch.nn.functional.softmax'?"),
        ("nolib.ops.attend", "there is no such function: no module 'nolib' is imported"),
        ("graphcap.eager", "the function is called 'graphcap.compiler.eager_functions.eager'"),
        ("higher_order::flex_atention", "there is no such operator; did you mean 'higher_order::flex_attention'?"),
    ],
)
def test_why(name: str, why: str) -> None:
    assert why_nothing_matches(name) == why


@pytest.mark.parametrize(
    "name",
    [SDPA, "aten::add.Tensor", "aten::mm.default", "higher_order::flex_attention", "torch.nn.functional.softmax"],
)
def test_what_exists_needs_no_reason(name: str) -> None:
    assert why_nothing_matches(name) == ""
