"""The ladder bench finds wrong rows, live calls and every size of its traffic."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import ladder, models, rowwise, table

CPU = torch.device("cpu")


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    monkeypatch.setenv("GRAPHCAP_COMPILER", "eager")
    path = tmp_path / "ladder.json"
    flags = ["--tiny", "--calls", "30", "--seconds", "0.3", "--threads", "2", "--only", "graphcap"]
    monkeypatch.setattr(sys, "argv", ["ladder", *flags, "--json", str(path)])
    ladder.main()
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return rows


def test_capture_traffic_and_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = run(tmp_path, monkeypatch)
    modes = ["PIECEWISE", "PIECEWISE, num_warmups=1", "FULL", "FULL, num_warmups=0"]
    assert [row["status"] for row in rows] == ["ok"] * (2 + 2 * len(modes) + 1)
    assert [row["part"] for row in rows[:3]] == ["libraries", "libraries", "capture"], "before any variant is timed"
    parts = {(row["part"], row["variant"]): row for row in rows}
    for mode in modes:
        num_graphs = 4 if mode.startswith("FULL") else 4 * 4  # 3 attentions: 4 graphs a size
        assert parts["capture", f"graphcap {mode}"]["num_graphs"] == num_graphs
    for row in rows:
        if row["part"] not in ("libraries", "capture"):
            assert row["wrong_rows"] == 0
            assert row["num_rows"] > row["num_calls"] > 0
    assert {column.field for column in table.LAYOUTS["ladder"].figures} >= {"wrong_rows", "live_in_ladder"}


def test_each_variant_has_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[str, str | None]] = []
    monkeypatch.setattr(ladder, "in_own_process", lambda arguments, *part: started.append(part))
    monkeypatch.setattr(ladder, "run_part", lambda *_: pytest.fail("in the process of other variants"))
    monkeypatch.setattr(sys, "argv", ["ladder", "--models", "0.6b", "--json", str(tmp_path / "ladder.json")])
    ladder.main()
    assert started == [("0.6b", variant) for variant in (*ladder.VARIANTS, None)]


def test_a_wrong_row_is_found() -> None:
    reference = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    errors = ladder.row_errors(reference[[1, 0, 2, 3, 4, 5]], reference)
    assert (errors > ladder.WRONG).tolist() == [True, True, False, False, False, False]


def test_a_worker_counts_wrong_rows() -> None:
    table_rows = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    calls = 0

    def model(x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("enough")
        return x if calls == 1 else x.roll(1, dims=1)

    worker = ladder.Worker(model, table_rows, table_rows, most=4, largest=2, seed=0)
    worker.run(deadline=float("inf"))
    assert worker.error == "failed: RuntimeError: enough"
    assert (worker.num_calls, worker.wrong_rows > 0) == (2, True)
    assert worker.num_beyond <= 2
    assert worker.wrong_rows < worker.num_rows


def test_rows_of_the_stateless_model_are_independent() -> None:
    model = rowwise.build_rowwise(16, 2, CPU, torch.float32, seed=0)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(model(x)[2:3], model(x[2:3]), atol=1e-6)


def test_the_reference_follows_the_caches() -> None:
    decoder = models.build_decoder(models.CONFIGS["tiny"], CPU, torch.float32, max_sequences=11)
    subject = ladder.Ladder(decoder, (1, 2, 4), 10, {})
    sizes = ladder.traffic_sizes(subject, 5)
    expected = ladder.references(subject, sizes)
    subject.fill_caches()
    for seed, (size, rows) in enumerate(zip(sizes, expected, strict=True), start=1):
        assert float(ladder.row_errors(decoder(*subject.inputs(size, seed)), rows).max()) < 1e-4
