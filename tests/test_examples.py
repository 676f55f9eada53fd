"""Every example runs to its end and comes to the right result."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def _without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHCAP_COMPILER", "eager")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """Runs an example and returns what it prints."""

    def run_example(name: str) -> str:
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, module.__name__, module)  # Dynamo looks a function's module up by name
        spec.loader.exec_module(module)
        module.main()
        return capsys.readouterr().out

    return run_example


def test_each_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {"quickstart", "huggingface", "decorator", "engine"}


def test_quickstart(run: Callable[[str], str]) -> None:
    printed = run("quickstart")
    assert printed.count("differs from eager by at most 0.0e+00") == 5
    assert "2 replays" in printed


def test_huggingface(run: Callable[[str], str]) -> None:
    printed = run("huggingface")
    assert re.findall(r"(\w+) cache: the tokens are eager's", printed) == ["dynamic", "static"]
    assert "grows with every call" in printed


def test_decorator(run: Callable[[str], str]) -> None:
    printed = run("decorator")
    assert printed.count("differs from eager by at most 0.0e+00") == 6
    assert "1 region" in printed, "the function that runs live does not break the graph"
    assert re.search(r"piece_1 +live", printed)


def test_engine(run: Callable[[str], str]) -> None:
    printed = run("engine")
    assert "10 of 10 requests have eager's tokens" in printed
    modes = re.search(r"replays by mode: \{'PIECEWISE': (\d+), 'FULL': (\d+)\}", printed)
    assert modes is not None
    assert all(int(replays) for replays in modes.groups())
    assert "1 region" in printed
    assert re.search(r"^ +1 +FULL +1 ", printed, re.MULTILINE), "attention is inside the one graph of a decode step"
