"""The decode bench measures what its table shows, on the tiny model."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

import graphcap
from bench import decode, decode_variants, models, table
from bench.decode_variants import Group


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, only: str) -> list[dict[str, object]]:
    path = tmp_path / "decode.json"
    flags = ["--tiny", "--batch", "2", "--steps", "2", "--rounds", "2", "--only", only, "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["decode", *flags])
    decode.main()
    rows: list[dict[str, object]] = json.loads(path.read_text())["rows"]
    return rows


def test_a_row_has_every_column_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = run(tmp_path, monkeypatch, only="eager")
    assert row["status"] == "ok"
    layout = table.LAYOUTS["decode"]
    assert {column.field for column in layout.names + layout.figures} <= row.keys()
    error = row["relative_error"]
    assert isinstance(error, float)
    assert math.isfinite(error)


def test_a_variant_that_raises_becomes_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(group: decode_variants.Group) -> decode_variants.Forward:
        raise RuntimeError(f"no luck with batch {group.batch}")

    monkeypatch.setitem(decode_variants.VARIANTS, "torch.compile default", broken)
    rows = run(tmp_path, monkeypatch, only="eager,default")
    assert [row["status"] for row in rows] == ["ok", "failed: RuntimeError: no luck with batch 2"]


def test_a_full_variant_that_runs_something_live_becomes_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undeclared = decode_variants.graphcap_compile("PIECEWISE")
    monkeypatch.setitem(decode_variants.VARIANTS, "graphcap FULL", undeclared)
    (row,) = run(tmp_path, monkeypatch, only="graphcap FULL")[:1]
    status = str(row["status"])
    assert status.startswith("failed: RuntimeError: piece_1 runs live in a FULL plan: lab::attention is an opaque")


@pytest.mark.gpu
def test_a_declared_attention_is_not_convicted_for_what_28_layers_make_of_rounding() -> None:
    """On an H200 two live runs of this model have other bits in a few of the 64 rows, 3 % apart after 28 layers."""
    device = torch.device("cuda")
    with torch.no_grad():
        model = models.build_decoder(models.CONFIGS["0.6b"], device, torch.bfloat16, max_sequences=64)
        models.fill_caches(model)
        group = Group(model, 64, device, {})
        forward = decode_variants.graphcap_backend("FULL")(group)
        for call in range(8):
            forward(*group.inputs(seed=call))
    (region,) = graphcap.explain(forward).regions
    assert not region.divergences
    assert not region.unchecked
    assert [plan.live for plan in region.plans] == [{}]
