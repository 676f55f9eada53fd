"""Random generators besides the default one whose draws may be captured.

A graph must know the generators that its kernels draw from before it is captured; torch adds the default one itself.
"""

from __future__ import annotations

import threading
import weakref

import torch

_lock = threading.Lock()
_registered: weakref.WeakSet[torch.Generator] = weakref.WeakSet()


def register_generator(generator: torch.Generator) -> None:
    """Let captured code draw from this generator: replays go on where it stands, and ``manual_seed`` on it is obeyed.

    Without that, a captured piece that uses a generator of its own fails to capture and runs live. It holds for
    captures that begin later, for as long as the generator lives.

    Raises:
        TypeError: it is no ``torch.Generator``.
    """
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"register_generator: expected a torch.Generator, got {type(generator).__name__}")
    with _lock:
        _registered.add(generator)


def registered(device: torch.device) -> list[torch.Generator]:
    """The generators of this device that were registered and are alive."""
    with _lock:
        alive = list(_registered)
    return [each for each in alive if each.device.type == device.type and each.device.index in (None, device.index)]
