"""Dynamo's own product in a dump: the bytecode that replaced the user's function, as Python where depyf is installed.

Only the transformed code object is read. Nothing is replaced, so the program that is debugged is the one that runs.
"""

from __future__ import annotations

import dis
import functools
import io
import logging
import re
import threading
from pathlib import Path
from types import CodeType

from graphcap.compiler import private

log = logging.getLogger(__name__)

#: Code objects whose transformation is awaited, and the folder to write it into.
_awaited: dict[CodeType, Path] = {}
_lock = threading.Lock()

#: Memory addresses, the ids of objects in the names of globals, and the random part of a compiled graph's name.
_UNSTABLE = (
    (re.compile(r"\b0x[0-9a-f]+"), "0x..."),
    (re.compile(r"_\d{9,}(?=_c\d)"), ""),
    (re.compile(r"(__compiled_fn_\d+)_[0-9a-f_]{32,}"), r"\1"),
)


def write_bytecode_later(code: CodeType, folder: Path) -> None:
    """Write the bytecode of ``code`` into ``folder`` when Dynamo has made it, which is after the backend returned."""
    with _lock:
        _awaited[code] = folder
    _watch()


@functools.cache
def _watch() -> None:
    private.on_bytecode(_on_bytecode)


def _on_bytecode(original: CodeType, transformed: CodeType) -> CodeType | None:
    with _lock:
        folder = _awaited.pop(original, None)
    if folder is not None:
        _write(original, transformed, folder)
    return None  # the program goes on with what Dynamo made


def _write(original: CodeType, transformed: CodeType, folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
        (folder / "transformed.dis.txt").write_text(_stable(disassembly(transformed)), encoding="utf-8")
        (folder / "transformed.py").write_text(_stable(decompiled(transformed)), encoding="utf-8")
    except Exception as error:  # whatever it is, Dynamo must not see it
        log.warning("the bytecode of %s is not in the dump: %s", original.co_qualname, error)


def disassembly(code: CodeType) -> str:
    """What ``dis`` prints."""
    text = io.StringIO()
    dis.dis(code, file=text)
    return text.getvalue()


def decompiled(code: CodeType) -> str:
    """Python source of a code object, or a comment that says why there is none."""
    try:
        import depyf
    except ImportError:
        return "# depyf is not installed: pip install 'torch-graphcap[debug]' adds the decompiled function here\n"
    try:
        return str(depyf.decompile(code))
    except Exception as error:  # it knows some versions of Python and some instructions, not all
        return f"# depyf could not decompile it: {type(error).__name__}: {error}\n# see transformed.dis.txt\n"


def _stable(text: str) -> str:
    """Without what is another one in every process."""
    for pattern, replacement in _UNSTABLE:
        text = pattern.sub(replacement, text)
    return text
