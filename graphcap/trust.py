"""Whether a file may be unpickled or loaded: artifacts are code, so who can write one can run code as us."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def distrust(info: os.stat_result, what: str) -> str | None:
    """Why ``what``, of which ``info`` was read, is not trusted; ``None`` when it is.

    Trusted is what belongs to the user or to root and cannot be written by the group or by others.
    """
    if info.st_uid not in (os.geteuid(), 0):
        return f"not trusted: {what} belongs to uid {info.st_uid}, not to {os.geteuid()} or root"
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"not trusted: {what} is writable by others (mode {stat.S_IMODE(info.st_mode):04o}); chmod go-w it"
    return None


def distrust_directory(path: Path) -> str | None:
    """The same for a directory, which must be one and not a link that somebody else could repoint.

    Raises:
        OSError: it cannot be looked at.
    """
    info = path.lstat()
    if not stat.S_ISDIR(info.st_mode):
        return f"not trusted: {path} is not a directory"
    return distrust(info, str(path))


def distrust_library(path: Path) -> str | None:
    """The same for a shared library, a regular file. Sound where its directory is trusted: who could swap it then?

    Raises:
        OSError: it cannot be looked at.
    """
    info = path.lstat()
    if not stat.S_ISREG(info.st_mode):
        return f"not trusted: {path} is not a regular file"
    return distrust(info, str(path))


def read_trusted(path: Path) -> bytes | str:
    """The bytes of a regular file, or why it is not trusted. Judged on the open file: it cannot be swapped in between.

    Raises:
        OSError: it does not exist, is a link, or cannot be read.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        info = os.fstat(file.fileno())
        if not stat.S_ISREG(info.st_mode):
            return f"not trusted: {path.name} is not a regular file"
        return distrust(info, path.name) or file.read()
