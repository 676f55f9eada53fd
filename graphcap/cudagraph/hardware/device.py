"""What the graph runtime asks of a device: to record calls without running them, and to run a recording again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

import torch

from graphcap.cudagraph.counters.cost import StepTime

if TYPE_CHECKING:
    from graphcap.cudagraph.hardware.account import Account, Usage

#: Runs a call on a device that has nothing to do; how long the host and the device took, launches included.
Stopwatch = Callable[[Callable[[], object]], StepTime]


class UnjoinedStreamError(RuntimeError):
    """A recording cannot be ended: work that was forked to another stream inside of it has not come back."""


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
            UnjoinedStreamError: a stream that a step has forked was not joined. The pool takes no recording after that.
            HookError: a hook of the user failed.
            Exception: the device refused the recording as a whole. After any of them it must be aborted.
        """

    def abort(self) -> None:
        """Throw the recording away and bring the device back to the state before it. Never raises."""


class Lock(AbstractContextManager[Any], Protocol):
    """A lock that a thread may take several times."""

    def acquire(self, blocking: bool = True) -> bool:
        """Take it, and say whether that went well."""

    def release(self) -> None:
        """Give it back."""


class GraphDevice(Protocol):
    """One device of the process, shared by every runner on it, or the part of it that has a pool of its own.

    Attributes:
        name: ``"cuda:0"`` or ``"simulated"``, for reports.
        device: where tensors must be to be part of a recording.
        lock: held during copies into static memory, replay and copies out of it.
        busy: whether a plan is running; a plan started inside of it would overwrite its memory.
        account: who holds memory of the device.
        unusable: why no graph can run here for the rest of the process, ``""`` otherwise.
    """

    name: str
    device: torch.device
    lock: Lock
    busy: bool
    account: Account
    unusable: str

    @property
    def stopwatch(self) -> Stopwatch | None:
        """Measures a call; ``None`` where times say nothing."""

    def enter(self) -> bool:
        """Order the caller's stream behind the last user of the pool. False when no graph may run here now.

        Look it up on every call: it is another function while there are hooks to call before a replay.
        """

    def wait(self) -> None:
        """Block until everything on the caller's stream has finished; after :meth:`enter`, that is every replay."""

    def session(self) -> AbstractContextManager[Pool]:
        """Everything that surrounds the recordings of one plan, with a pool that takes recordings. May be nested."""

    def begin(self, pool: Pool, released: Sequence[torch.Tensor]) -> Recording:
        """Start recording. ``released``: results of earlier segments that ended their life between two segments.

        Raises:
            HookError: a hook of the user failed.
        """

    def allocate(self, nbytes: int) -> torch.Tensor:
        """A uint8 tensor ``[nbytes]`` outside the pool that plans on any stream may use. Never an inference tensor."""

    def at_end(self, segments: Sequence[Any], lent: Collection[int]) -> Callable[[], None] | None:
        """What a replay does when its outputs have been made, if anything. ``lent``: storages that the caller reads."""

    def spare_bytes(self) -> int:
        """Memory of the device that copies may take for a moment, in bytes."""

    def used_bytes(self) -> int:
        """Memory of the device in use, in bytes, that of graphs included."""

    def usage(self) -> Usage:
        """What plans hold alone (with whatever else lies outside torch's allocator), and what they share."""

    def shared_bytes(self) -> int:
        """The second part of :meth:`usage` alone, which costs less."""

    def default_limit(self) -> int | None:
        """How many bytes graphs may take where nobody says, ``None`` for any number."""

    def trim(self) -> None:
        """Give back memory that is cached and not in use, so that a capture finds it."""

    def call_before_replay(self, functions: Sequence[Callable[[], object]]) -> None:
        """From now on :meth:`enter` calls these."""

    def forked(self) -> None:
        """This is a child of ``os.fork``: nothing of the parent's locks, and of its GPU, can be used."""
