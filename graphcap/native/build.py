"""Compiles ``checks.cpp`` with the system's C++ compiler, for the very torch and Python that are running.

One translation unit against torch's headers: about ten seconds of one core, at the lowest priority.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

NAME = "graphcap_native"  #: of the module; ``checks.cpp`` has it in the name of its init function
SOURCE = Path(__file__).with_name("checks.cpp")
HEADERS = sorted(SOURCE.parent.glob("*.h"))
TIMEOUT_SECONDS = 600.0

_COMPILERS = ("c++", "g++", "clang++")
_TORCH_WITH_CXX20_HEADERS = (2, 13)


class BuildError(Exception):
    """Why there is no extension, in one line."""


@dataclass(frozen=True)
class Recipe:
    """How to compile here.

    Attributes:
        command: the compiler with every argument but the output.
        digest: of all that decides what comes out: source, arguments, compiler, torch, Python, platform.
    """

    command: tuple[str, ...]
    digest: str


def recipe() -> Recipe:
    """Look at this machine.

    Raises:
        BuildError: for a Python that the source is not made for, or when a compiler or a header is missing.
    """
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise BuildError("not made for a free-threaded Python")
    compiler = _find_compiler()
    options = _options()
    parts = [  # no paths: an environment that moves, or two of the same make, share what was built
        SOURCE.read_text(),
        *(header.read_text() for header in HEADERS),
        *options,
        _run([*compiler, "--version"], timeout_seconds=60),
        str(torch.__version__),
        str(torch.version.git_version),
        str(sysconfig.get_config_var("SOABI")),
        platform.machine(),
        *platform.libc_ver(),
    ]
    command = (*compiler, *options, *_places())
    return Recipe(command, hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32])


def build(how: Recipe, target: Path) -> None:
    """Compile to ``target``, atomically.

    Raises:
        BuildError: with the compiler's first error.
        OSError: when the directory cannot be written.
    """
    descriptor, name = tempfile.mkstemp(prefix="building-", suffix=".so", dir=target.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        nice = [path, "-n", "19"] if (path := shutil.which("nice")) else []
        _run([*nice, *how.command, "-o", name], timeout_seconds=TIMEOUT_SECONDS, leftover=temporary)
        temporary.chmod(0o700)
        with temporary.open("rb") as library:
            os.fsync(library.fileno())  # a crash of the machine must not leave half of it under the final name
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _find_compiler() -> list[str]:
    chosen = shlex.split(os.environ.get("CXX", ""))
    for candidate in [chosen] if chosen else [[name] for name in _COMPILERS]:
        if path := shutil.which(candidate[0]):
            return [path, *candidate[1:]]
    tried = f"CXX={shlex.join(chosen)}" if chosen else ", ".join(_COMPILERS)
    raise BuildError(f"no C++ compiler found (tried {tried})")


def _options() -> list[str]:
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    return [
        *("-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-w"),
        "-std=c++20" if version >= _TORCH_WITH_CXX20_HEADERS else "-std=c++17",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
    ]


def _places() -> list[str]:
    python, root = Path(sysconfig.get_path("include")), Path(torch.__file__).parent
    if not (python / "Python.h").is_file():
        raise BuildError(f"no Python.h in {python}: install Python's headers")
    includes = ["-isystem", str(root / "include"), "-isystem", str(python)]
    return [*includes, str(SOURCE), f"-L{root / 'lib'}", "-ltorch_python", "-ltorch_cpu", "-lc10"]


def _run(command: list[str], timeout_seconds: float, leftover: Path | None = None) -> str:
    """The output of a command. It ends with this process at the latest, and ``leftover`` is removed then."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C is for the program; and so that the driver's children can be ended with it
        env={**os.environ, "LC_ALL": "C"},
    )

    def stop() -> None:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=5)
        if leftover is not None:
            leftover.unlink(missing_ok=True)

    atexit.register(stop)
    try:
        output, _ = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        stop()
        raise BuildError(f"build failed: {command[0]} took longer than {timeout_seconds:g} s") from None
    finally:
        atexit.unregister(stop)
    if process.returncode != 0:
        raise BuildError(f"build failed: {_first_error(output) or f'exit status {process.returncode}'}")
    return output


def _first_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[-1] if lines else "")[:300]
