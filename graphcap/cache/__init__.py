"""Compiled pieces on disk: keys, a content-addressed store, locks. Knows bytes and strings, not models or graphs."""

from graphcap.cache.entry import Entry, Miss
from graphcap.cache.key import KeyParts, PieceKey, toolchain_identity
from graphcap.cache.store import ArtifactStore, StoredEntry
from graphcap.cache_root import cache_root

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
