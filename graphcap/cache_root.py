"""Where artifacts live."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

ENVIRONMENT_VARIABLE = "GRAPHCAP_CACHE_DIR"


def cache_root(configured: str | None = None) -> Path:
    """The directory of the artifact cache; it need not exist yet.

    The first of: ``configured``, ``$GRAPHCAP_CACHE_DIR``, ``$XDG_CACHE_HOME/graphcap``, ``~/.cache/graphcap``, and for
    a user without a home directory one of their own under the temporary directory. Empty values count as unset, and
    so does a relative ``XDG_CACHE_HOME``, as the XDG specification demands. ``~`` is expanded.
    """
    chosen = configured or os.environ.get(ENVIRONMENT_VARIABLE)
    if chosen:
        return _absolute(Path(chosen))
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if xdg.is_absolute():
        return xdg / "graphcap"
    with contextlib.suppress(RuntimeError):  # no home directory
        return Path.home() / ".cache" / "graphcap"
    return Path(tempfile.gettempdir()) / f"graphcap-{os.geteuid()}"


def _absolute(path: Path) -> Path:
    with contextlib.suppress(RuntimeError):  # no home directory: "~" is then a name like any other
        path = path.expanduser()
    # Absolute at once: a program that changes its working directory must not get a second cache.
    return path.absolute()
