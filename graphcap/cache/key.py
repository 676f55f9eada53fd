"""The identity of a compiled piece: everything that decides its bytes, and nothing else.

Left out on purpose, because they change nothing in the generated code and would only cost hits: host names, paths,
environment variables, layer names and indices, the rank. A device's index is part of a key: Inductor's wrapper selects
its device and stream by number, so ranks that see their GPUs under different numbers share nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import platform
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from graphcap.cache.private import torch_git_version, torch_source_digest

#: Joins every digest: raise it when the meaning of a part changes, and old entries are simply not found.
KEY_VERSION = 3


@dataclass(frozen=True, slots=True)
class PieceKey:
    """Six parts, each a canonical text. Two pieces share an artifact exactly when all six are equal.

    A part that is too coarse silently reuses the wrong kernel; one that is too fine only compiles again. When in doubt,
    add.

    Attributes:
        graph: the piece in canonical form: ops, literals and their order; names, layers and parameters renumbered.
        inputs: per input dtype, shape, strides, storage offset, requires_grad, and how the symbols relate and range.
        passes: fingerprints of the passes that run inside, in order (``PassPipeline.fingerprint()``).
        toolchain: what generates and loads the code; :func:`toolchain_identity`.
        config: settings that reach the generated code: compiler, Inductor options, static sizes, grad mode.
        device: index, architecture and capability of the device.
    """

    graph: str
    inputs: str
    passes: str
    toolchain: str
    config: str
    device: str

    @property
    def digest(self) -> str:
        """SHA-256 over all parts, 64 hex characters: the entry's address in a store."""
        return _sha256(f"graphcap piece key {KEY_VERSION}", *(text for pair in self for text in pair))

    def parts(self) -> KeyParts:
        """The digest of each part, small enough to keep beside the artifact."""
        return KeyParts(**{name: _sha256(text) for name, text in self})

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """``(name, text)`` of each part, in the order of the fields."""
        return ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))


@dataclass(frozen=True, slots=True)
class KeyParts:
    """The parts of a :class:`PieceKey`, each as SHA-256 hex: enough to say which of them differ."""

    graph: str
    inputs: str
    passes: str
    toolchain: str
    config: str
    device: str

    def changed(self, other: KeyParts) -> tuple[str, ...]:
        """Names of the parts in which two keys differ."""
        mine, theirs = self.to_dict(), other.to_dict()
        return tuple(name for name in mine if mine[name] != theirs[name])

    def to_dict(self) -> dict[str, str]:
        """JSON-ready; ``KeyParts(**parts.to_dict())`` gives back an equal object."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, str]) -> KeyParts:
        """The parts that :meth:`to_dict` was called on.

        Raises:
            TypeError: a part is missing, or there is one that this version does not know.
        """
        return cls(**data)

    def __str__(self) -> str:
        """``graph=0123456789ab inputs=... device=...``: one line for logs."""
        return " ".join(f"{name}={digest[:12]}" for name, digest in self.to_dict().items())


@functools.cache
def toolchain_identity() -> str:
    """Canonical JSON naming torch, its sources, Triton, Python and the machine's architecture; computed once."""
    identity = {
        "torch": str(torch.__version__),
        "torch_git": torch_git_version(),
        "torch_sources": torch_source_digest(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "triton": _installed("triton") or _installed("pytorch-triton") or _installed("pytorch-triton-rocm"),
        "python": f"{sys.implementation.name} {sys.version_info.major}.{sys.version_info.minor}",
        "machine": f"{sys.platform} {platform.machine()}",
    }
    return json.dumps(identity, sort_keys=True)


def _installed(distribution: str) -> str | None:
    try:
        return f"{distribution} {importlib.metadata.version(distribution)}"
    except importlib.metadata.PackageNotFoundError:
        return None


def _sha256(*texts: str) -> str:
    """Hex digest; every text is preceded by its length, so that no two sequences of texts share one stream."""
    digest = hashlib.sha256()
    for text in texts:
        content = text.encode("utf-8", "surrogatepass")
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()
