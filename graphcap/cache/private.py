"""Everything this room takes from torch that torch does not promise to keep. Checked on 2.11 and 2.13."""

from __future__ import annotations

import torch


def torch_git_version() -> str:
    """The commit torch was built from, ``"unknown"`` when the build does not say."""
    return str(getattr(torch.version, "git_version", None) or "unknown")


def torch_source_digest() -> str:
    """Hex digest over torch's Python sources, so that an edited or nightly torch never shares artifacts.

    Takes about 0.6 s once per process; Inductor computes the same value, cached in the same place, for its own cache.
    ``"unknown"`` when this torch has no such digest: version and commit then stand alone.
    """
    try:
        from torch._inductor.codecache import torch_key
    except ImportError:
        return "unknown"
    return torch_key().hex()
