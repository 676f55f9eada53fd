"""The file format of an artifact: a fixed header, then the payload.

::

    offset  size
         0     8   b"GRAPHCAP"
         8     4   format version, little endian like every number here
        12    32   digest of the key the entry was stored under
        44    32   SHA-256 of the payload
        76    32   SHA-256 of manifest.json beside it
       108     8   length of the payload in bytes
       116     -   payload

Bytes are trusted by who owns the file (:mod:`graphcap.trust`); the checksums find damage, not malice.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FORMAT_VERSION = 1

_MAGIC = b"GRAPHCAP"
_HEADER = struct.Struct("<8sI32s32s32sQ")


@dataclass(frozen=True, slots=True)
class Entry:
    """A verified artifact.

    Attributes:
        digest: the key it is stored under.
        payload: the artifact's bytes, exactly as saved.
        manifest: what the writer said about it.
    """

    digest: str
    payload: bytes
    manifest: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Miss:
    """No artifact. ``reason``: ``"absent"``, ``"damaged: ..."``, ``"foreign format 3, ..."``, ``"not trusted: ..."`` or
    ``"unreadable: ..."``."""

    reason: str

    @property
    def damaged(self) -> bool:
        """Whether an entry is there that nobody will ever be able to use."""
        return self.reason.startswith("damaged")


def pack(digest: str, payload: bytes, manifest: bytes) -> bytes:
    """The artifact file that belongs to ``manifest``, the bytes of the manifest file."""
    sums = hashlib.sha256(payload).digest(), hashlib.sha256(manifest).digest()
    return _HEADER.pack(_MAGIC, FORMAT_VERSION, bytes.fromhex(digest), *sums, len(payload)) + payload


def unpack(digest: str, artifact: bytes, manifest: bytes) -> Entry | Miss:
    """Verify an artifact file and its manifest file, read for the key ``digest``."""
    if len(artifact) < _HEADER.size:
        return Miss(f"damaged: {len(artifact)} bytes, shorter than the header")
    magic, version, key, payload_sum, manifest_sum, length = _HEADER.unpack_from(artifact)
    payload = artifact[_HEADER.size :]
    if magic != _MAGIC:
        return Miss("damaged: not an artifact file")
    if version != FORMAT_VERSION:
        return Miss(f"foreign format {version}, this version reads {FORMAT_VERSION}")
    if key.hex() != digest:
        return Miss(f"damaged: stored under another key, {key.hex()[:12]}")
    if len(payload) != length:
        return Miss(f"damaged: {len(payload)} payload bytes, the header says {length}")
    if hashlib.sha256(payload).digest() != payload_sum:
        return Miss("damaged: sha256 mismatch")
    if hashlib.sha256(manifest).digest() != manifest_sum:
        return Miss("damaged: sha256 mismatch in manifest.json")
    return Entry(digest, payload, json.loads(manifest)["about"])
