"""Result files are continued, never mixed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench.record import Record

CPU = torch.device("cpu")


def open_record(path: Path) -> Record:
    return Record(path, "decode", CPU, key=("variant", "batch"))


def test_a_row_replaces_the_one_with_its_key(tmp_path: Path) -> None:
    path = tmp_path / "decode.json"
    record = open_record(path)
    for batch, status in ((1, "ok"), (2, "ok"), (1, "failed: x")):
        record.put({"variant": "eager", "batch": batch, "status": status})
    rows = json.loads(path.read_text())["rows"]
    assert [(row["batch"], row["status"]) for row in rows] == [(1, "failed: x"), (2, "ok")]


def test_a_second_run_of_the_same_environment_continues(tmp_path: Path) -> None:
    path = tmp_path / "decode.json"
    open_record(path).put({"variant": "eager", "batch": 1, "status": "ok"})
    assert len(open_record(path).rows) == 1


def test_figures_of_another_commit_are_put_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "decode.json"
    monkeypatch.setenv("GRAPHCAP_COMMIT", "aaa")
    open_record(path).put({"variant": "eager", "batch": 1, "status": "ok"})
    monkeypatch.setenv("GRAPHCAP_COMMIT", "bbb")
    assert open_record(path).rows == []
    assert json.loads((tmp_path / "decode.previous.json").read_text())["environment"]["commit"] == "aaa"
