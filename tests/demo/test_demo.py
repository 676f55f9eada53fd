"""``graphcap demo`` from its command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen3Config, Qwen3ForCausalLM

from graphcap import cli, demo
from graphcap.compiler.backend import graphcap


@pytest.fixture(autouse=True)
def _without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHCAP_COMPILER", "eager")


def run_json(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    assert demo.main(["--json", *options]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_fp32_tokens_are_eagers_and_the_simulated_device_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--tokens", "8"]) == 0
    printed = capsys.readouterr().out
    assert "OK: all 16 tokens of 2 prompts are eager's" in printed
    assert "SIMULATED" in printed
    assert "Median decode step" not in printed
    assert "LlamaForCausalLM_" in printed, "the report"


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_bf16_is_compared_with_fp32(cache: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, "--dtype", "bf16", "--cache", cache, "--tokens", "8", "--batch", "2", "--arch", "qwen3")
    assert found["agrees"]
    assert 0 < found["verdict"]["error"] <= 1.1 * found["verdict"]["eager_error"]
    assert found["simulated"]
    assert found["decode_step"] is None
    assert found["steps"]["replay"]["count"] >= 8
    assert sum(steps["count"] for steps in found["steps"].values()) == 16
    assert found["report"]["regions"]


def test_wrong_tokens_end_with_status_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def negated(gm: Any, inputs: Any, **settings: Any) -> Any:
        return lambda *args: tuple(-out if out.is_floating_point() else out for out in gm(*args))

    monkeypatch.setattr(demo, "backend", negated)
    assert demo.main(["--tokens", "4"]) == 1
    assert "WRONG: prompt 1, sequence 1: token 1 is not eager's" in capsys.readouterr().out


def test_local_checkpoint_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 100, "head_dim": 8}
    config = Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    found = run_json(capsys, "--model", str(tmp_path), "--tokens", "6")
    assert found["model"]["class"] == "Qwen3ForCausalLM"
    assert found["model"]["weights"] == str(tmp_path)


def test_missing_transformers_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert cli.main(["demo"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "pip install 'torch-graphcap[demo]'" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--hidden", "50"], "--hidden 50: must be a multiple of 32"),
        (["--model", "/no/such/folder"], "no such folder"),
        (["--tokens", "1"], "expected an integer >= 2, got '1'"),
        (["--batch", "-3"], "expected an integer >= 1"),
    ],
)
def test_mistakes_on_the_command_line(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        demo.main(options)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_the_demo_compiles_with_the_backend_of_the_entry_point() -> None:
    assert demo.backend is graphcap
