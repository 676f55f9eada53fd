"""What happened to a region and when: one JSON object per line, appended as it happens, so a crash keeps the rest."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any


class Timeline:
    """``timeline.jsonl`` of one region. Every line has ``time`` (seconds since the epoch) and ``event``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()

    def add(self, event: str, *, at: float | None = None, **facts: Any) -> None:
        """Append one event.

        Args:
            event: ``"opened"``, ``"split"``, ``"compiled"``, ``"captured"``...
            at: when it happened; now where not given.
            facts: JSON-ready; anything else is written as its text.

        Raises:
            OSError: the file cannot be written.
        """
        line = json.dumps({"time": round(time.time() if at is None else at, 6), "event": event, **facts}, default=str)
        with self._lock, self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
