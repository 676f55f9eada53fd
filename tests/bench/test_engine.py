"""The engine bench serves the same traffic through every runner and counts what it says it counts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from bench import engine, engine_runners, table
from bench.engine_runners import LIMITS, HandMade, Setup
from examples.engine import Decoder


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> Setup:
    monkeypatch.setattr(torch, "compile", lambda fn, **_: fn)
    torch.manual_seed(0)
    limits = LIMITS["tiny"]
    return Setup(Decoder(limits.sizes, limits.num_blocks).eval().requires_grad_(False), limits)


def rows(setup: Setup, runner: engine_runners.Runner) -> torch.Tensor:
    with torch.inference_mode():
        return engine.forced_rows(setup.engine(runner), engine.mixed_traffic(setup.limits, 9))


def test_the_hand_made_runner_computes_the_model(setup: Setup) -> None:
    expected = rows(setup, engine_runners.eager(setup))
    with torch.inference_mode():
        runner = HandMade(setup, setup.model)
    used: list[int] = []
    for size, (replay, output) in list(runner._replays.items()):
        runner._replays[size] = (lambda size=size, replay=replay: (used.append(size), replay()), output)
    assert torch.allclose(rows(setup, runner), expected, atol=1e-5)
    assert len(set(used)) > 2, "several rungs were replayed"


def test_a_row_of_another_request_is_wrong() -> None:
    reference = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    swapped = reference[[1, 0, *range(2, 8)]]
    assert engine.errors(reference, reference) == {"relative_error": 0.0, "wrong_rows": 0, "checked_rows": 8}
    assert engine.errors(swapped, reference)["wrong_rows"] == 2
    assert engine.errors(reference * torch.nan, reference)["wrong_rows"] == 8


def test_pure_decode_times_decode_steps_only(setup: Setup) -> None:
    traffic = engine.decode_traffic(setup.limits, num_reqs=4, num_steps=6)
    batches: list[int | None] = []
    run = engine_runners.eager(setup)

    def spy(batch: engine_runners.Batch) -> torch.Tensor:
        batches.append(batch.uniform_query_len)
        return run(batch)

    with torch.inference_mode():
        served = engine.serve(setup.engine(spy), traffic, decode_only=True, max_steps=6)
    assert served.tokens == [4] * 6
    assert batches[-6:] == [1] * 6
    assert None in batches


def test_mixed_traffic_generates_every_token(setup: Setup) -> None:
    traffic = engine.mixed_traffic(setup.limits, 7)
    with torch.inference_mode():
        served = engine.serve(setup.engine(engine_runners.eager(setup)), traffic)
    assert sum(served.tokens) == sum(new for _, _, new in traffic)
    assert len(served.seconds) == len(served.tokens)


def test_a_row_has_every_column_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda fn, **_: fn)
    path = tmp_path / "engine.json"
    flags = ["--tiny", "--rounds", "1", "--steps", "3", "--requests", "4", "--batch", "2", "--only", "eager,hand"]
    monkeypatch.setattr(sys, "argv", ["engine", *flags, "--json", str(path)])
    engine.main()
    measured = json.loads(path.read_text())["rows"]
    assert [row["traffic"] for row in measured] == ["decode, 2 requests", "mixed, 4 requests"] * 2
    layout = table.LAYOUTS["engine"]
    for row in measured:
        assert row["status"] == "ok"
        assert {column.field for column in layout.names + layout.figures} <= row.keys()
        assert row["wrong_rows"] == 0


def test_a_variant_that_raises_becomes_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(setup: Setup) -> engine_runners.Runner:
        raise RuntimeError("no luck")

    monkeypatch.setitem(engine_runners.VARIANTS, "eager", broken)
    path = tmp_path / "engine.json"
    monkeypatch.setattr(sys, "argv", ["engine", "--tiny", "--only", "eager", "--json", str(path)])
    engine.main()
    assert [row["status"] for row in json.loads(path.read_text())["rows"]] == ["failed: RuntimeError: no luck"]
