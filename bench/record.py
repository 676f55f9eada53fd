"""The JSON file of a bench: where it ran, and one row per variant, written after every row."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bench.harness import say

Row = dict[str, Any]


def commit() -> str:
    """The commit that was measured: ``GRAPHCAP_COMMIT`` where there is no git, ``-dirty`` with local changes."""
    named = os.environ.get("GRAPHCAP_COMMIT")
    if named:
        return named
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parent,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def driver_version() -> str | None:
    """The NVIDIA driver's version, or None without one."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = answer.stdout.split()
    return lines[0] if lines else None


def installed(name: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def environment(device: torch.device) -> dict[str, Any]:
    """What a reader needs to know to repeat a figure."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU ({platform.machine()})",
        "cpu_cores": os.cpu_count(),
        "driver": driver_version() if cuda else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "transformers": installed("transformers"),
        "commit": commit(),
    }


class Record:
    """Rows on disk under their key fields.

    An existing file of the same environment is continued, so that a bench may be run in parts; rows with the same key
    are replaced. A file from another environment is kept beside the new one as ``NAME.previous.json``.
    """

    def __init__(self, path: Path, bench: str, device: torch.device, key: tuple[str, ...]) -> None:
        self.path = path
        self._key = key
        self._bench = bench
        self._environment = environment(device)
        self.rows = self._continued()

    def _continued(self) -> list[Row]:
        if not self.path.exists():
            return []
        earlier = json.loads(self.path.read_text())
        if earlier.get("bench") == self._bench and earlier.get("environment") == self._environment:
            say(f"continuing {self.path}: {len(earlier['rows'])} rows")
            return list(earlier["rows"])
        kept = self.path.with_suffix(".previous.json")
        self.path.replace(kept)
        say(f"{self.path} is from another environment or commit: kept as {kept}")
        return []

    def put(self, row: Row) -> None:
        """Add or replace one row and write the file."""
        row = {**row, "date": datetime.date.today().isoformat()}
        same = [i for i, old in enumerate(self.rows) if all(old.get(k) == row.get(k) for k in self._key)]
        if same:
            self.rows[same[0]] = row
        else:
            self.rows.append(row)
        content = {"bench": self._bench, "environment": self._environment, "rows": self.rows}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        temporary.replace(self.path)
