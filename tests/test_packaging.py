"""What is in the archives, and that an installed wheel gives torch.compile its backend."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from email import message_from_string
from pathlib import Path

import pytest

from graphcap import __version__

pytest.importorskip("build")
pytest.importorskip("hatchling")

ROOT = Path(__file__).parents[1]
LINKS = ("cache", "compiler", "cudagraph", "passes")
NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv", ".*_cache", ".hypothesis", "__pycache__", "dist", "build", "results"
)


@dataclass(frozen=True)
class Archives:
    """The folder with the wheel and the sdist, and the files of the package that they were built from."""

    folder: Path
    package_files: frozenset[str]

    @property
    def wheel(self) -> Path:
        return self.folder / f"torch_graphcap-{__version__}-py3-none-any.whl"

    @property
    def sdist(self) -> Path:
        return self.folder / f"torch_graphcap-{__version__}.tar.gz"


@pytest.fixture(scope="module", params=["symlinks", "no symlinks"])
def archives(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Archives:
    """Build from a checkout that has the root's links as links, and from one that has them as git writes them where a
    file system has none: small text files that hold the target."""
    checkout = tmp_path_factory.mktemp("checkout") / "graphcap"
    shutil.copytree(ROOT, checkout, symlinks=True, ignore=NOT_COPIED)
    for link in LINKS:
        assert (checkout / link).readlink() == Path("graphcap") / link
        if request.param == "no symlinks":
            (checkout / link).unlink()
            (checkout / link).write_text(f"graphcap/{link}")
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--sdist", "--outdir", str(out), "."]
    built = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    files = (path for path in (checkout / "graphcap").rglob("*") if path.is_file())
    return Archives(out, frozenset(str(path.relative_to(checkout)) for path in files))


@pytest.fixture
def wheel(archives: Archives) -> Iterator[zipfile.ZipFile]:
    with zipfile.ZipFile(archives.wheel) as opened:
        yield opened


def test_wheel_is_the_package_and_nothing_else(archives: Archives, wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    packaged = {name for name in names if ".dist-info/" not in name}
    assert packaged == archives.package_files
    assert {
        "graphcap/py.typed",
        "graphcap/native/checks.cpp",
        "graphcap/native/places.h",
        "graphcap/native/dict_watch.h",
        "graphcap/native/vectorcall.h",
    } <= packaged
    assert len(names) == len(set(names))


def test_wheel_metadata(wheel: zipfile.ZipFile) -> None:
    info = f"torch_graphcap-{__version__}.dist-info"
    metadata = message_from_string(wheel.read(f"{info}/METADATA").decode())
    assert (metadata["Name"], metadata["Version"]) == ("torch-graphcap", __version__)
    assert metadata["License-Expression"] == "Apache-2.0"
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert required == ["torch>=2.11"], "nothing but torch is needed to run"
    assert {"demo", "debug", "remote", "dev"} == set(metadata.get_all("Provides-Extra", []))
    entry_points = wheel.read(f"{info}/entry_points.txt").decode()
    assert "[torch_dynamo_backends]\ngraphcap = graphcap.compiler.backend:graphcap" in entry_points
    assert "[console_scripts]\ngraphcap = graphcap.cli:main" in entry_points
    assert "Apache License" in wheel.read(f"{info}/licenses/LICENSE").decode()


def test_sdist_holds_every_module_once(archives: Archives) -> None:
    with tarfile.open(archives.sdist) as sdist:
        names = [name.partition("/")[2] for name in sdist.getnames()]
    assert archives.package_files <= set(names)
    assert not [name for name in names if name.split("/")[0] in LINKS]
    assert {"README.md", "LICENSE", "CHANGELOG.md", "tests/conftest.py"} <= set(names)


def test_installed_wheel_is_found_by_name(archives: Archives, tmp_path: Path) -> None:
    """A fresh process that never imports graphcap compiles with backend="graphcap"."""
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*pip, str(archives.wheel)], check=True)
    program = """
import sys, torch
assert "graphcap" not in sys.modules
double = torch.compile(lambda x: x * 2, backend="graphcap", options={"compiler": "eager"})
assert double(torch.ones(3)).tolist() == [2, 2, 2]
print(sys.modules["graphcap"].__file__)
"""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == str(site / "graphcap" / "__init__.py")
