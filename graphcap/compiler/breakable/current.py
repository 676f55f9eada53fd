"""The recording that is going on in this thread, for what must behave otherwise within one: ``@graphcap.eager``."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol


class Recording(Protocol):
    """What a recording offers to the functions that run within it."""

    def live(self, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run ``fn`` as one call, whatever it does inside."""


class _Local(threading.local):
    recording: Recording | None = None


_local = _Local()


def recording() -> Recording | None:
    """The recording of this thread, ``None`` outside of one."""
    return _local.recording


def set_recording(new: Recording | None) -> None:
    """Begin or end a recording in this thread."""
    _local.recording = new
