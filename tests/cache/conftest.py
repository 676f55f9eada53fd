from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from graphcap.cache import ArtifactStore, PieceKey

#: New processes that share no locks, threads or open files with this one, and import torch only once between them.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["graphcap.cache"])


def key_for(graph: str = "add(a0, a1)") -> PieceKey:
    return PieceKey(graph=graph, inputs="f32[s0, 8]", passes="p", toolchain="torch 2", config="{}", device="cpu")


@pytest.fixture
def key() -> PieceKey:
    return key_for()


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "cache")


def directory_of(store: ArtifactStore, key: PieceKey) -> Path:
    return store.root / "pieces" / key.digest[:2] / key.digest
