"""The command line: dispatch, and what the doctor finds."""

from __future__ import annotations

import json
import re
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

from graphcap import __version__, cli, doctor
from graphcap.errors import MissingExtraError


class FakeEntryPoint:
    """An entry point named ``graphcap``, as importlib.metadata would find it."""

    name = "graphcap"

    def __init__(self, value: str = doctor.ENTRY_POINT, error: Exception | None = None) -> None:
        self.value, self.error = value, error

    def load(self) -> object:
        if self.error:
            raise self.error
        return self


@pytest.fixture(autouse=True)
def _healthy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend is installed, whether or not the tests run from a plain checkout."""
    monkeypatch.setattr(metadata, "entry_points", lambda group: [FakeEntryPoint()])


def finding(name: str) -> doctor.Finding:
    return next(each for each in doctor.examine() if each.name == name)


def use_command(monkeypatch: pytest.MonkeyPatch, main: object) -> None:
    module = ModuleType("graphcap_test_command")
    module.main = main  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(cli.COMMANDS, "demo", (module.__name__, "a stand-in"))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"graphcap {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["--json"], ["--help"], ["--model", "x", "y"]])
def test_a_command_gets_its_own_arguments_and_gives_the_status(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    use_command(monkeypatch, lambda argv: seen.append(argv) or 7)
    assert cli.main(["demo", *arguments]) == 7
    assert seen == [arguments]


def test_a_mistake_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: list[str]) -> int:
        raise MissingExtraError("demo", "transformers", "the demo")

    use_command(monkeypatch, main)
    assert cli.main(["demo"]) == 2
    expected = "graphcap demo: the demo needs the package transformers: pip install 'torch-graphcap[demo]'\n"
    assert capsys.readouterr().err == expected


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["dance"])
    assert stop.value.code == 2
    assert "demo" in capsys.readouterr().err


def test_a_healthy_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    table = capsys.readouterr().out
    assert re.search(rf"^ok  graphcap +{re.escape(__version__)}$", table, re.MULTILINE)
    assert "!!" not in table


def test_json_says_what_the_table_says(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert cli.main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    assert [each["name"] for each in report["findings"] if each["remedy"]] == ["C++ compiler"]
    assert cli.main(["doctor"]) == 1
    assert "!!  C++ compiler     none of no-such-compiler found" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("entry_points", "value"),
    [
        ([], "does not know the name"),
        ([FakeEntryPoint("other:backend")], "'graphcap' is other:backend"),
        ([FakeEntryPoint(error=ImportError("no torch"))], "does not load: ImportError('no torch')"),
    ],
)
def test_backend_that_cannot_be_found(
    entry_points: list[FakeEntryPoint], value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "entry_points", lambda group: entry_points)
    found = finding("backend")
    assert value in found.value
    assert "pip install" in found.remedy


def test_the_unrelated_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.3" if name == "graphcap" else real(name))
    found = finding("distribution")
    assert found.value.startswith("'graphcap' 0.3 is installed")
    assert found.remedy.startswith("pip uninstall graphcap")


def test_bad_variable_is_reported_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHCAP_MAX_PLANS", "many")
    assert "GRAPHCAP_MAX_PLANS: expected an integer" in finding("environment").remedy


def test_variables_that_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHCAP_MAX_PLANS", "8")
    assert "GRAPHCAP_MAX_PLANS -> 8" in finding("environment").value


def test_cache_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cache"
    monkeypatch.setenv("GRAPHCAP_CACHE_DIR", str(folder))
    assert finding("cache") == doctor.Finding("cache", f"{folder}: not there yet, can be made")
    folder.mkdir()
    (folder / "artifact").write_bytes(bytes(3 * 2**19))
    assert finding("cache") == doctor.Finding("cache", f"{folder}: writable, 1.5 MiB")
    monkeypatch.setenv("GRAPHCAP_CACHE_DIR", str(folder / "artifact"))
    assert "not writable" in finding("cache").value
    assert "GRAPHCAP_CACHE_DIR" in finding("cache").remedy


def test_old_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.__version__", "2.9.1+cu126")
    assert finding("torch").remedy == "graphcap needs torch 2.11 or newer"


def test_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert finding("gpu").value.startswith("none")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: f"Made-up GPU {index}")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(doctor, "_first_line", lambda command: f"from {command[0]}")
    assert finding("gpu 0").value == "Made-up GPU 0, capability 9.0, driver from nvidia-smi"


def test_native_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert finding("native checks").value.startswith("python: the extension is built when")
    monkeypatch.setenv("GRAPHCAP_NATIVE", "0")
    assert finding("native checks").value == "python: GRAPHCAP_NATIVE=0"
    monkeypatch.setenv("GRAPHCAP_CACHE", "0")
    assert "no cache" in finding("native checks").value
