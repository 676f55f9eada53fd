"""``graphcap doctor``: what graphcap finds on this machine, and what to do about what is wrong."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from pathlib import Path

from graphcap import __version__
from graphcap.cache import cache_root
from graphcap.config import Config
from graphcap.errors import ConfigError

OLDEST_TORCH = (2, 11)
ENTRY_POINT = "graphcap.compiler.backend:graphcap"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: what was looked at.
        value: what was found.
        remedy: what to do about it; empty when nothing is wrong.
    """

    name: str
    value: str
    remedy: str = ""


def main(argv: Sequence[str]) -> int:
    """Print every finding; returns 1 when one of them needs a remedy."""
    parser = argparse.ArgumentParser(prog="graphcap doctor", description="Look at what graphcap needs on this machine.")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    as_json = parser.parse_args(argv).json
    findings = examine()
    problems = [finding for finding in findings if finding.remedy]
    if as_json:
        print(json.dumps({"ok": not problems, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        for finding in findings:
            print(f"{'!!' if finding.remedy else 'ok'}  {finding.name:<16} {finding.value}")
        for finding in problems:
            print(f"\n{finding.name}: {finding.remedy}")
    return 1 if problems else 0


def examine() -> list[Finding]:
    """Every finding, in the order in which a reader would ask."""
    checks: list[Callable[[], Iterator[Finding]]] = [
        _versions,
        _foreign_distribution,
        _entry_point,
        _settings,
        _cxx_compiler,
        _cache_directory,
        _native_checks,
        _gpu,
    ]
    return [finding for check in checks for finding in check()]


def _versions() -> Iterator[Finding]:
    yield Finding("graphcap", __version__)
    yield Finding("python", platform.python_version())
    try:
        import torch
    except ImportError as error:
        yield Finding("torch", f"does not import: {error}", "pip install 'torch>=2.11'")
        return
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    too_old = version < OLDEST_TORCH
    yield Finding("torch", torch.__version__, "graphcap needs torch 2.11 or newer" if too_old else "")
    try:
        yield Finding("triton", metadata.version("triton"))
    except metadata.PackageNotFoundError:
        yield Finding("triton", "not installed (only kernels for a GPU need it)")


def _foreign_distribution() -> Iterator[Finding]:
    try:
        version = metadata.version("graphcap")
    except metadata.PackageNotFoundError:
        return
    yield Finding(
        "distribution",
        f"'graphcap' {version} is installed: an unrelated project with the same top-level package",
        "pip uninstall graphcap; pip install --force-reinstall --no-deps torch-graphcap",
    )


def _entry_point() -> Iterator[Finding]:
    found = [entry for entry in metadata.entry_points(group="torch_dynamo_backends") if entry.name == "graphcap"]
    reinstall = "pip install torch-graphcap (in a checkout: pip install -e .)"
    if not found:
        yield Finding("backend", "torch.compile does not know the name 'graphcap'", reinstall)
    elif found[0].value != ENTRY_POINT:
        yield Finding("backend", f"'graphcap' is {found[0].value}, not {ENTRY_POINT}", reinstall)
    else:
        try:
            found[0].load()
        except Exception as error:  # whatever an import may raise: that is the finding
            yield Finding("backend", f"{ENTRY_POINT} does not load: {error!r}", reinstall)
        else:
            yield Finding("backend", "torch.compile(..., backend='graphcap') finds it")


def _settings() -> Iterator[Finding]:
    try:
        from_environment = [setting for setting in Config.resolve().describe() if setting.origin.startswith("env ")]
    except ConfigError as error:
        yield Finding("environment", "a variable cannot be read", str(error))
        return
    described = ", ".join(f"{setting.origin.removeprefix('env ')} -> {setting.value}" for setting in from_environment)
    yield Finding("environment", described or "no GRAPHCAP_* variable set")


def _cxx_compiler() -> Iterator[Finding]:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        yield Finding("C++ compiler", f"none of {', '.join(names)} found", "install g++ or clang++, or set CXX")
    else:
        yield Finding("C++ compiler", f"{path}: {_first_line([path, '--version'])}")


def _cache_directory() -> Iterator[Finding]:
    try:
        root = cache_root(Config.resolve().cache_dir)
    except ConfigError:
        return  # already reported with the environment
    nearest = next(folder for folder in (root, *root.parents) if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        remedy = "set GRAPHCAP_CACHE_DIR to a folder that you can write to, or GRAPHCAP_CACHE=0"
        yield Finding("cache", f"{root} is not writable: {error.strerror}", remedy)
        return
    if root.exists():
        mib = sum(path.stat().st_size for path in root.rglob("*") if path.is_file()) / 2**20
        yield Finding("cache", f"{root}: writable, {mib:.1f} MiB")
    else:
        yield Finding("cache", f"{root}: not there yet, can be made")


def _native_checks() -> Iterator[Finding]:
    try:
        native = import_module("graphcap.native")
        config = Config.resolve()
    except (ImportError, ConfigError):
        return  # already reported: torch, the environment
    if not config.cache:
        yield Finding("native checks", "python: there is no cache to build the extension in")
        return
    yield Finding("native checks", native.look(cache_root(config.cache_dir)))


def _gpu() -> Iterator[Finding]:
    try:
        torch = import_module("torch")
    except ImportError:
        return  # already reported with the versions
    if not torch.cuda.is_available():
        yield Finding("gpu", "none: pieces run compiled; CUDA graphs only with simulate=True, on the simulated device")
        return
    driver = _first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        major, minor = torch.cuda.get_device_capability(index)
        yield Finding(f"gpu {index}", f"{name}, capability {major}.{minor}, driver {driver}")


def _first_line(command: Sequence[str]) -> str:
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"({Path(command[0]).name} failed: {error})"
    return output.splitlines()[0].strip() if output.strip() else "(no output)"
