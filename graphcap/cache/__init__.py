"""Compiled pieces on disk: keys, a content-addressed store, locks. Knows bytes and strings, not models or graphs."""

from graphcap.cache.entry import Entry, Miss
from graphcap.cache.key import KeyParts, PieceKey, toolchain_identity
from graphcap.cache.root import cache_root
from graphcap.cache.store import ArtifactStore, StoredEntry

__all__ = [
    "ArtifactStore",
    "Entry",
    "KeyParts",
    "Miss",
    "PieceKey",
    "StoredEntry",
    "cache_root",
    "toolchain_identity",
]
