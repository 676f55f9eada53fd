"""What the graph runtime asks of a device: to record calls without running them, and to run a recording again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch


class Pool(Protocol):
    """The memory that recordings allocate from. It lives as long as something refers to it."""


class Segment(Protocol):
    """A finished recording."""

    @property
    def replay(self) -> Callable[[], None]:
        """Run the recorded work on the caller's current stream, at the recorded addresses."""


class Recording(Protocol):
    """A recording in progress."""

    def call(self, fn: Callable[..., Any], args: Sequence[Any]) -> Sequence[Any]:
        """Record ``fn(*args)``. Its results have an address, and no meaningful value before the replay.

        Raises:
            Exception: whatever the device or ``fn`` raises; the recording must then be aborted.
        """

    def release(self, tensor: torch.Tensor) -> None:
        """The last reader of this result is recorded: what is recorded from here on may reuse its memory."""

    def end(self) -> Segment:
        """Finish.

        Raises:
            Exception: the device refused the recording as a whole; it must then be aborted.
        """

    def abort(self) -> None:
        """Throw the recording away and bring the device back to the state before it. Never raises."""


class GraphDevice(Protocol):
    """One device of the process, shared by every runner on it.

    Attributes:
        name: ``"cuda:0"`` or ``"simulated"``, for reports.
        device: where tensors must be to be part of a recording.
        lock: held during copies into static memory, replay and copies out of it.
        busy: whether a plan is running; a plan started inside of it would overwrite its memory.
    """

    name: str
    device: torch.device
    lock: AbstractContextManager[Any]
    busy: bool

    def enter(self) -> bool:
        """Order the caller's stream behind the last user of the pool. False when no graph may run here now."""

    def session(self) -> AbstractContextManager[Pool]:
        """Everything that surrounds the recordings of one plan."""

    def begin(self, pool: Pool, released: Sequence[torch.Tensor]) -> Recording:
        """Start recording. ``released``: results of earlier segments that ended their life between two segments."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        """A uint8 tensor ``[nbytes]`` outside the pool that plans on any stream may use. Never an inference tensor."""

    def at_end(self, segments: Sequence[Any], lent: Collection[int]) -> Callable[[], None] | None:
        """What a replay does when its outputs have been made, if anything. ``lent``: storages that the caller reads."""

    def used_bytes(self) -> int:
        """Memory of the device in use, in bytes, that of graphs included."""
