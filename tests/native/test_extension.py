"""How the extension is built, found, trusted, and given up; nothing of it may disturb the program."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from graphcap import Config, ConfigError, native
from graphcap.native import build, extension, fallback, loader
from graphcap.native.build import BuildError
from graphcap.native.extension import Extension
from tests.native.conftest import built


@pytest.fixture
def root() -> Path:
    """A cache that has the extension."""
    module = built()
    if isinstance(module, str):
        pytest.skip(module)
    assert module.__file__ is not None
    return Path(module.__file__).parents[2]


def prepared(root: Path) -> Extension:
    subject = Extension()
    subject.prepare(root)
    deadline = time.monotonic() + 600
    while subject.status() == "building" and time.monotonic() < deadline:
        time.sleep(0.01)
    return subject


def compiler(path: Path, script: str) -> str:
    """A C++ compiler of our own: answers --version, and otherwise runs ``script``."""
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exec echo "pretended 1.0"\n{script}\n')
    path.chmod(0o755)
    return str(path)


@pytest.mark.slow
def test_builds_where_nothing_is(tmp_path: Path) -> None:
    subject = prepared(tmp_path / "cache")
    if subject.status().startswith(("python: no C++ compiler", "python: no Python.h")):
        pytest.skip(subject.status())
    assert subject.status() == "extension"
    weight = torch.ones(3)
    check = subject.address_check([0], [weight.data_ptr()])
    assert type(check).__module__ == "graphcap_native"
    assert check((weight,))
    (directory,) = (tmp_path / "cache" / "native").iterdir()
    assert sorted(path.name for path in directory.iterdir()) == ["graphcap_native.so", "lock"]
    assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "cache").rglob("*"))


def test_is_found_without_a_build(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "build", lambda how, target: pytest.fail("built again"))
    assert prepared(root).status() == "extension"
    assert Extension().look(root) == "extension"


def test_starts_in_python_and_changes_over(root: Path) -> None:
    class Plan:
        check: extension.AddressCheck

    subject, plan, gone = Extension(), Plan(), Plan()
    plan.check = subject.address_check([0], [0])
    assert isinstance(plan.check, fallback.AddressCheck)
    assert isinstance(subject.identity_check([]), fallback.IdentityCheck)

    def update(owner: Plan) -> None:
        owner.check = subject.address_check([0], [0])

    subject.when_ready(plan, update)
    subject.when_ready(gone, lambda owner: pytest.fail("updated the dead"))
    ref = weakref.ref(gone)
    del gone
    gc.collect()
    assert ref() is None, "waiting keeps nobody alive"
    subject.prepare(root)
    deadline = time.monotonic() + 60
    while isinstance(plan.check, fallback.AddressCheck) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not isinstance(plan.check, fallback.AddressCheck)
    late = Plan()
    subject.when_ready(late, update)
    assert not isinstance(late.check, fallback.AddressCheck)


def test_failing_update_is_logged(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    subject, owner = Extension(), build.Recipe((), "")
    subject.when_ready(owner, lambda owner: owner.nothing)  # type: ignore[attr-defined]
    with caplog.at_level(logging.WARNING):
        subject.prepare(root)
        deadline = time.monotonic() + 60
        while not caplog.records and time.monotonic() < deadline:
            time.sleep(0.01)
    assert "keeps its checks in Python" in caplog.text
    assert subject.status() == "extension"


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    subject = prepared(tmp_path / "cache")
    assert subject.status() == "python: no C++ compiler found (tried c++, g++, clang++)"
    assert isinstance(subject.address_check([], []), fallback.AddressCheck)
    monkeypatch.setenv("CXX", "icpx -fast")
    assert prepared(tmp_path / "cache").status() == "python: no C++ compiler found (tried CXX=icpx -fast)"


def test_failing_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    script = "echo 'In file included from x'; echo 'x.h:1:2: error: out of cheese' >&2; exit 1"
    monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", script))
    with caplog.at_level(logging.INFO, logger="graphcap"):
        subject = prepared(tmp_path / "cache")
    assert subject.status() == "python: build failed: x.h:1:2: error: out of cheese"
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "out of cheese" in caplog.text
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()] == ["lock"]


def test_compiler_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "TIMEOUT_SECONDS", 0.2)
    monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", "sleep 300"))
    assert "took longer than 0.2 s" in prepared(tmp_path / "cache").status()


def test_a_build_ends_with_the_process(tmp_path: Path) -> None:
    program = f"""
import time
from pathlib import Path
from graphcap import native
native.prepare(Path({str(tmp_path / "cache")!r}))
while not Path({str(tmp_path / "pid")!r}).exists():
    time.sleep(0.01)
print(native.status())
"""
    cxx = compiler(tmp_path / "cxx", f"echo $$ > {tmp_path}/pid.new; mv {tmp_path}/pid.new {tmp_path}/pid; sleep 300")
    environment = {**os.environ, "CXX": cxx}
    command = [sys.executable, "-c", program]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "building\n", "")
    pid = int((tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()] == ["lock"]


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ('while [ "$1" != -o ]; do shift; done; echo rubbish > "$2"', "what was built does not load"),
        ("exit 0", "what was built does not load"),
    ],
)
def test_compiler_that_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, why: str) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", script))
    assert why in prepared(tmp_path / "cache").status()


def place(root: Path) -> Path:
    """Where the extension would be, with rubbish in its place."""
    path = root / "native" / build.recipe().digest / "graphcap_native.so"
    path.parent.mkdir(parents=True, mode=0o700)
    path.write_bytes(b"rubbish")
    path.chmod(0o700)
    return path


def test_damaged_file_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rebuild(how: build.Recipe, target: Path) -> None:
        raise BuildError("was asked to build")

    monkeypatch.setattr(loader, "build", rebuild)
    place(tmp_path / "cache")
    assert prepared(tmp_path / "cache").status() == "python: was asked to build"
    assert Extension().look(tmp_path / "cache").startswith("python: ")


def loosen(path: Path) -> None:
    path.chmod(0o777)


def give_away(path: Path) -> None:
    os.chown(path, 4321, 4321)


def link(path: Path) -> None:
    elsewhere = path.with_name("elsewhere")
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


@pytest.mark.parametrize(
    "poison", [loosen, link, pytest.param(give_away, marks=pytest.mark.skipif(os.geteuid() != 0, reason="root"))]
)
@pytest.mark.parametrize("above", range(4))
def test_poisoned_cache_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poison: Callable[[Path], None], above: int
) -> None:
    """The library and each directory down to the root of the cache."""
    monkeypatch.setattr(loader, "spec_from_loader", lambda *args: pytest.fail("loaded"))
    path = place(tmp_path / "cache")
    poison((path, *path.parents)[above])
    subject = prepared(tmp_path / "cache")
    assert subject.status().startswith("python: not trusted: ")
    assert subject.look(tmp_path / "cache").startswith("python: not trusted: ")


def test_unwritable_cache(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    assert prepared(tmp_path / "cache").status().startswith("python: ")


def test_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHCAP_NATIVE", "0")
    subject = prepared(tmp_path / "cache")
    assert subject.status() == subject.look(tmp_path) == "python: GRAPHCAP_NATIVE=0"
    assert not (tmp_path / "cache").exists()
    Config.resolve()
    monkeypatch.setenv("GRAPHCAP_NATIVE", "perhaps")
    assert "environment variable GRAPHCAP_NATIVE: expected one of" in prepared(tmp_path).status()
    with pytest.raises(ConfigError, match="GRAPHCAP_NATIVE"):
        Config.resolve()


def test_nothing_is_built_unasked(tmp_path: Path) -> None:
    assert Extension().status() == Extension().look(tmp_path / "cache")
    assert Extension().status().startswith("python: the extension is built when")
    assert not (tmp_path / "cache").exists()
    assert native.address_check([], [])(())
    assert native.identity_check([])()
