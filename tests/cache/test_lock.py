from __future__ import annotations

import os
import signal
import threading
import time
from multiprocessing.synchronize import Event
from pathlib import Path

from graphcap.cache import ArtifactStore, PieceKey
from tests.cache.conftest import key_for, processes


def count_up(root: Path, path: Path) -> None:
    """Read, wait, write: loses counts unless nobody else is between the two."""
    with ArtifactStore(root).lock(key_for()) as held:
        assert held
        number = int(path.read_text())
        time.sleep(0.02)
        path.write_text(str(number + 1))


def hold(root: Path, holding: Event) -> None:
    with ArtifactStore(root).lock(key_for()):
        holding.set()
        time.sleep(60)


def test_processes_exclude_each_other(store: ArtifactStore, tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")
    workers = [processes.Process(target=count_up, args=(store.root, counter)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert counter.read_text() == "3"


def test_threads_exclude_each_other(store: ArtifactStore, tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")
    threads = [threading.Thread(target=count_up, args=(store.root, counter)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counter.read_text() == "4"


def test_after_the_timeout_the_work_is_done_without_the_lock(store: ArtifactStore, key: PieceKey) -> None:
    with store.lock(key) as first:
        start = time.monotonic()
        with store.lock(key, timeout_seconds=0.2) as second:
            waited = time.monotonic() - start
        assert (first, second) == (True, False)
        assert 0.2 <= waited < 5
        with store.lock(key_for("another piece"), timeout_seconds=0) as other:
            assert other
    with store.lock(key, timeout_seconds=0) as again:
        assert again


def test_a_dead_holder_blocks_nobody(store: ArtifactStore, key: PieceKey) -> None:
    holding = processes.Event()
    holder = processes.Process(target=hold, args=(store.root, holding))
    holder.start()
    assert holding.wait(60)
    with store.lock(key, timeout_seconds=0) as held:
        assert not held
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with store.lock(key, timeout_seconds=10) as held:
        assert held


def test_an_exception_releases_the_lock(store: ArtifactStore, key: PieceKey) -> None:
    try:
        with store.lock(key):
            raise KeyError
    except KeyError:
        pass
    with store.lock(key, timeout_seconds=0) as held:
        assert held


def test_where_no_lock_can_be_had_the_work_is_done_anyway(tmp_path: Path, key: PieceKey) -> None:
    (tmp_path / "file").write_text("not a directory")
    with ArtifactStore(tmp_path / "file").lock(key) as held:
        assert not held
