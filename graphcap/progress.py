"""A progress bar on stderr, drawn only where somebody can see it: on a terminal, and on rank 0."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType

WIDTH = 30


class Progress:
    """``with Progress("compiling", 12, enabled=True) as bar: ...; bar.advance()``."""

    def __init__(self, label: str, total: int, *, enabled: bool) -> None:
        """Make a bar.

        Args:
            label: what is being done.
            total: how many steps there are.
            enabled: draw it, if stderr is a terminal and this is rank 0.
        """
        first_rank = os.environ.get("RANK", "0") == "0"
        self.label, self.total, self.done = label, total, 0
        self.visible = enabled and total > 0 and first_rank and sys.stderr.isatty()

    def __enter__(self) -> Progress:
        self.started = time.perf_counter()
        self._draw("")
        return self

    def advance(self, note: str = "") -> None:
        """One step is done; ``note`` is shown behind the bar."""
        self.done += 1
        self._draw(note)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.visible:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def _draw(self, note: str) -> None:
        if not self.visible:
            return
        filled = WIDTH * self.done // self.total
        elapsed = time.perf_counter() - self.started
        left = f"{elapsed / self.done * (self.total - self.done):4.1f} s left" if self.done else ""
        bar = "#" * filled + "." * (WIDTH - filled)
        sys.stderr.write(f"\r\x1b[K{self.label} [{bar}] {self.done}/{self.total} {left} {note}")
        sys.stderr.flush()
