"""The replay bench compiles each variant once and measures it at every batch size."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench import plot, replay, table


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, only: str) -> dict[str, object]:
    monkeypatch.setenv("GRAPHCAP_COMPILER", "eager")
    path = tmp_path / "replay.json"
    flags = ["--tiny", "--batch", "1,3", "--steps", "2", "--rounds", "1", "--only", only, "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["replay", *flags])
    replay.main()
    content: dict[str, object] = json.loads(path.read_text())
    return content


def test_rows_of_every_batch_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = run(tmp_path, monkeypatch, only="graphcap FULL static sealed,graphcap PIECEWISE static,hand-made FULL")
    rows = content["rows"]
    assert isinstance(rows, list)
    measured = [row for row in rows if row["status"] == "ok"]
    assert {(row["batch"], row["variant"]) for row in measured} >= {
        (batch, f"graphcap {mode} static sealed") for batch in (1, 3) for mode in ("FULL", "PIECEWISE")
    }
    assert {row["status"] for row in rows if row["variant"] == "hand-made FULL"} == {"skipped: needs CUDA"}
    layout = table.LAYOUTS["replay"]
    assert all({column.field for column in layout.names + layout.figures} <= row.keys() for row in measured)


def test_a_variant_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    group = replay.AnyBatch.__new__(replay.AnyBatch)
    group.made = {}
    made = [group.once("one", object) for _ in range(2)]
    assert made[0] is made[1]
    assert group.once("other", object) is not made[0]


def test_curves_are_in_the_order_of_the_batch() -> None:
    rows = [
        {"model": "m", "variant": "a", "batch": batch, "status": "ok", "host_median_us": float(batch)}
        for batch in (8, 1, 2)
    ]
    rows.append({"model": "m", "variant": "b", "batch": 1, "status": "failed: x"})
    assert plot.curves(rows, "m", "host_median_us") == {"a": [(1, 1.0), (2, 2.0), (8, 8.0)]}


def test_without_matplotlib_the_curves_are_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path = tmp_path / "replay.json"
    row = {"model": "m", "variant": "a", "batch": 4, "status": "ok", "host_median_us": 12.34, "step_mean_us": 5.0}
    path.write_text(json.dumps({"environment": {}, "rows": [row]}))
    monkeypatch.setattr(sys, "argv", ["plot", "--json", str(path)])
    plot.main()
    assert "4: 12.3" in capsys.readouterr().out
    assert not path.with_suffix(".png").exists()
