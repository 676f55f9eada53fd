"""One process makes something on disk, the others wait for it."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.05


@contextlib.contextmanager
def file_lock(path: Path, timeout_seconds: float) -> Iterator[bool]:
    """Hold an exclusive lock on ``path`` between processes and between threads; not reentrant.

    The kernel drops the lock with its holder, however that ends, so a dead holder blocks nobody; the file stays, since
    removing it would let two processes lock two files of one name.

    Yields:
        ``True`` with the lock held; ``False`` when it could not be had within ``timeout_seconds`` or at all. The body
        runs either way: without the lock the worst case is work done twice.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        logger.debug("going on without the lock %s: %s", path, error)
        yield False
        return
    try:
        held = _acquire(descriptor, path, timeout_seconds)
        try:
            yield held
        finally:
            if held:
                # Explicitly: a child forked in the meantime holds a copy of the descriptor, so closing is not enough.
                fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, path: Path, timeout_seconds: float) -> bool:
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                logger.warning("going on without the lock %s: not free after %g s", path, timeout_seconds)
                return False
            time.sleep(min(_POLL_SECONDS, remaining))
        except OSError as error:  # a file system without locks
            logger.debug("going on without the lock %s: %s", path, error)
            return False
