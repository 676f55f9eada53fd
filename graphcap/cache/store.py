"""A content-addressed store of compiled pieces in a directory.

::

    <root>/pieces/ab/<digest>/artifact        header and payload (graphcap.cache.entry)
    <root>/pieces/ab/<digest>/manifest.json   what it is, for people and tools
    <root>/quarantine/<digest>-<random>       entries that failed verification
    <root>/locks/<digest>                     one empty file per key that was ever locked

An entry is written into a temporary directory beside its place and renamed there, so that a reader sees all of it or
nothing, whatever happens to the writer. There is no fsync: an entry torn by a power loss fails its checksum and is a
miss, which costs one compile; syncing would cost milliseconds per piece on every cold start.

Nothing here raises for the state of the disk: a load is a hit or a :class:`Miss`, a save is stored or says why not.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphcap.cache.entry import FORMAT_VERSION, Entry, Miss, pack, unpack
from graphcap.cache.key import PieceKey
from graphcap.lock import file_lock
from graphcap.trust import distrust_directory, read_trusted

logger = logging.getLogger(__name__)

_ARTIFACT, _MANIFEST = "artifact", "manifest.json"

#: Writers that meet a damaged entry at one moment may each lose a round to another.
_PLACE_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class StoredEntry:
    """An entry as listed, not verified.

    Attributes:
        digest: the key it is stored under.
        path: its directory.
        size_bytes: of the artifact file.
        modified: when it was written, seconds since the epoch.
    """

    digest: str
    path: Path
    size_bytes: int
    modified: float


class ArtifactStore:
    """Compiled pieces under one root directory; safe to use from several threads and processes at once."""

    def __init__(self, root: Path) -> None:
        """Use ``root``, which is created with mode 0700 when it is first needed."""
        self.root = root.resolve()  # a cache directory may be a link to a larger disk; what it leads to is judged

    def load(self, key: PieceKey) -> Entry | Miss:
        """The verified artifact for ``key``. A damaged one is moved to quarantine and is a miss."""
        directory = self._directory(key.digest)
        try:
            found = self._read(key.digest, directory)
        except OSError as error:
            found = Miss(f"unreadable: {_explain(error)}")
        if isinstance(found, Miss) and found.reason != "absent":
            logger.warning("artifact %s is not used: %s", key.digest[:12], found.reason)
            if found.damaged:
                self._quarantine(directory)
        return found

    def save(self, key: PieceKey, payload: bytes, manifest: Mapping[str, Any]) -> str | None:
        """Store an artifact. An entry that is already there and sound is kept: equal keys mean equal artifacts.

        Args:
            key: what the artifact was compiled from.
            payload: its bytes.
            manifest: JSON-ready facts about it, given back by :meth:`load`.

        Returns:
            ``None`` when the store now holds a sound entry for ``key``, else why it does not.
        """
        directory = self._directory(key.digest)
        try:
            described = _describe(key, payload, manifest)
            for parent in (self.root, self.root / "pieces", directory.parent):
                _make_private(parent)
            refused = _first_distrusted(self.root, self.root / "pieces", directory.parent)
            return refused or self._place(key, directory, pack(key.digest, payload, described), described)
        except (OSError, TypeError, ValueError) as error:
            logger.warning("artifact %s is not stored: %s", key.digest[:12], error)
            return _explain(error)

    def lock(self, key: PieceKey, timeout_seconds: float = 600.0) -> AbstractContextManager[bool]:
        """Hold the lock of ``key``, so that of several processes one compiles it and the others then load it.

        The context's value says whether the lock is held; see :func:`graphcap.lock.file_lock`.
        """
        locks = self.root / "locks"
        with contextlib.suppress(OSError):  # the lock itself then says that it cannot be had
            _make_private(self.root)
            _make_private(locks)
        return file_lock(locks / key.digest, timeout_seconds)

    def entries(self) -> Iterator[StoredEntry]:
        """Every entry, by digest, without verifying it; one that vanishes meanwhile is skipped."""
        for path in sorted((self.root / "pieces").glob("??/" + "?" * 64)):
            with contextlib.suppress(OSError):
                info = (path / _ARTIFACT).stat()
                yield StoredEntry(path.name, path, info.st_size, info.st_mtime)

    def _directory(self, digest: str) -> Path:
        return self.root / "pieces" / digest[:2] / digest

    def _read(self, digest: str, directory: Path) -> Entry | Miss:
        """Trust first, then verify; nothing is interpreted before both.

        Raises:
            OSError: the entry is there and cannot be read.
        """
        try:
            refused = _first_distrusted(self.root, self.root / "pieces", directory.parent, directory)
        except FileNotFoundError:
            return Miss("absent")
        if refused is not None:
            return Miss(refused)
        try:
            artifact, manifest = read_trusted(directory / _ARTIFACT), read_trusted(directory / _MANIFEST)
        except FileNotFoundError:  # or another process has just moved the entry to quarantine
            return Miss("damaged: a file of the entry is missing" if directory.exists() else "absent")
        if isinstance(artifact, str):
            return Miss(artifact)
        if isinstance(manifest, str):
            return Miss(manifest)
        return unpack(digest, artifact, manifest)

    def _place(self, key: PieceKey, directory: Path, artifact: bytes, manifest: bytes) -> str | None:
        """Write both files into a temporary directory beside ``directory`` and rename it there."""
        temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=directory.parent))
        reason = ""
        try:
            for name, content in ((_ARTIFACT, artifact), (_MANIFEST, manifest)):
                _write_private(temporary / name, content)
            for _ in range(_PLACE_ATTEMPTS):
                try:
                    temporary.replace(directory)
                    return None
                except OSError as error:  # an entry is there already, or the disk refuses
                    reason = _explain(error)
                if isinstance(self.load(key), Entry):
                    return None
                self._quarantine(directory)  # what is there serves nobody; then try again
            return reason
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _quarantine(self, directory: Path) -> None:
        """Move an entry out of the way, best effort: it may belong to somebody else, or be gone already."""
        with contextlib.suppress(OSError):
            if not directory.exists():
                return
            quarantine = self.root / "quarantine"
            _make_private(quarantine)
            slot = Path(tempfile.mkdtemp(prefix=f"{directory.name}-", dir=quarantine))
            try:
                directory.replace(slot)
            except OSError:
                slot.rmdir()


def _describe(key: PieceKey, payload: bytes, manifest: Mapping[str, Any]) -> bytes:
    """The bytes of ``manifest.json``.

    Raises:
        TypeError, ValueError: ``manifest`` is not JSON-ready.
    """
    described = {
        "format": FORMAT_VERSION,
        "key": key.digest,
        "key_parts": key.parts().to_dict(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "size_bytes": len(payload),
        "about": dict(manifest),
    }
    return json.dumps(described, indent=2).encode()


def _first_distrusted(*directories: Path) -> str | None:
    return next(filter(None, map(distrust_directory, directories)), None)


def _make_private(directory: Path) -> None:
    """Create ``directory`` with mode 0700; one that exists keeps its mode, and is judged by it."""
    if not directory.is_dir():
        directory.parent.mkdir(parents=True, exist_ok=True)
        directory.mkdir(mode=0o700, exist_ok=True)


def _write_private(path: Path, content: bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(content)


def _explain(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
