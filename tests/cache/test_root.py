from __future__ import annotations

from pathlib import Path

import pytest

from graphcap.cache import cache_root


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("GRAPHCAP_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", "/home/ada")


def test_the_most_explicit_setting_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_root() == Path("/home/ada/.cache/graphcap")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_root() == Path("/xdg/graphcap")
    monkeypatch.setenv("GRAPHCAP_CACHE_DIR", "/environment")
    assert cache_root() == Path("/environment")
    assert cache_root("/code") == Path("/code")


def test_tilde_is_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_root("~/artifacts") == Path("/home/ada/artifacts")
    monkeypatch.setenv("GRAPHCAP_CACHE_DIR", "~/other")
    assert cache_root() == Path("/home/ada/other")


def test_a_relative_directory_is_fixed_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert cache_root("here") == tmp_path / "here"


def test_empty_and_relative_variables_count_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHCAP_CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_root("") == Path("/home/ada/.cache/graphcap")


def test_no_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    assert cache_root().is_absolute()
