"""The decode bench measures what its table shows, on the tiny model."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from bench import decode, decode_variants, table


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
