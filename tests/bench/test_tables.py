"""The tables that a reader sees are the measured JSON files, nothing typed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import summaries, table
from bench.summaries import SUMMARIES

ENVIRONMENT = {"device": "Some GPU", "torch": "2.11.0", "triton": None, "python": "3.12.3", "commit": "abc"}


def decode_row(variant: str, **figures: Any) -> dict[str, Any]:
    return {"model": "tiny", "batch": 4, "variant": variant, "date": "2026-11-21", "status": "ok", **figures}


def decode_file(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"bench": "decode", "environment": ENVIRONMENT, "rows": list(rows)}


def test_rows_become_lines_in_order() -> None:
    text = table.render(decode_file(decode_row("eager", step_mean_us=1234.6, host_mean_us=9.87), decode_row("other")))
    lines = text.splitlines()
    assert lines[0] == "**tiny-like decoder, batch 4**"
    assert lines[4] == "| eager | 1235 | - | - | - | 9.9 | - | - | - | - |"
    assert lines[5].startswith("| other | - |")
    assert lines[-1].startswith("Measured by `bench/decode.py` on Some GPU (torch 2.11.0, python 3.12.3), 2026-11-21")


def test_a_failed_row_says_why_and_keeps_the_columns() -> None:
    failed = {**decode_row("broken"), "status": "failed: ValueError: a|b"}
    lines = table.render(decode_file(failed)).splitlines()
    assert "failed: ValueError: a\\|b" in lines[4]
    assert lines[4].replace("\\|", "").count("|") == lines[2].count("|")


def test_a_variant_that_does_not_apply_is_left_out() -> None:
    skipped = {**decode_row("elsewhere"), "status": "skipped: needs CUDA"}
    assert "elsewhere" not in table.render(decode_file(decode_row("eager"), skipped))


def test_each_group_has_its_table() -> None:
    text = table.render(decode_file(decode_row("eager"), {**decode_row("eager"), "batch": 8}))
    assert "batch 4**" in text
    assert "batch 8**" in text


def test_filling_keeps_everything_outside_the_markers(tmp_path: Path) -> None:
    (tmp_path / "decode.json").write_text(json.dumps(decode_file(decode_row("eager"))))
    unmeasured = "after\n<!-- bench:startup -->\n<!-- /bench:startup -->"
    once = table.filled(f"before\n<!-- bench:decode -->\nold\n<!-- /bench:decode -->\n{unmeasured}", tmp_path)
    assert once.startswith("before\n<!-- bench:decode -->\n**tiny-like")
    assert once.endswith(f"<!-- /bench:decode -->\n{unmeasured}")
    assert "old" not in once
    assert table.filled(once, tmp_path) == once


@pytest.mark.parametrize("name", sorted({**table.LAYOUTS, **SUMMARIES}))
def test_the_documents_show_the_results(name: str) -> None:
    stem, write = SUMMARIES.get(name, (name, table.render))
    result = table.ROOT / "bench" / "results" / f"{stem}.json"
    if not result.exists():
        pytest.skip(f"{result.name} has not been measured")
    found = [each for path in table.DOCUMENTS if (each := table.between_markers(path.read_text(), name))]
    assert len(found) == 1, f"no document has <!-- bench:{name} --> markers, or several"
    assert found[0]["body"] == write(json.loads(result.read_text())) + "\n", "run python -m bench.table"


def test_one_figure_across_a_field() -> None:
    rows = [
        {**decode_row(name), "batch": batch, "us": us} for name, batch, us in (("a", 1, 2), ("a", 8, 3), ("b", 8, 4))
    ]
    failed = {**decode_row("c"), "batch": 64, "status": "failed"}
    lines = summaries.across(decode_file(*rows, failed), ["variant"], "batch", "us", str).splitlines()
    assert lines[:4] == ["| variant | 1 | 8 |", "| --- | ---: | ---: |", "| a | 2 | 3 |", "| b | - | 4 |"]
    assert lines[-1].startswith("Measured by")
