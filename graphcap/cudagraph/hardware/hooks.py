"""Functions of yours that run around captures and before replays: join copy streams, wait for a transfer.

``on_capture_enter`` hooks run before a graph capture begins, on the caller's stream. ``on_capture_exit`` hooks run
inside of it, just before it ends: the recording stream is current, and what they do there is recorded. A plan of
several segments has several captures. ``before_replay`` hooks run before a plan does, on the caller's stream, the
capturing call included. Should the plan turn out not to fit, the call runs live after them. Without such a hook a
replay does not look for one.

Hooks run in the order in which they were registered, in every thread, while the device is locked. One that raises
around a capture ends it: the call runs live, and the reason names the hook. One that raises before a replay ends the
call.

Example::

    def join():
        with torch.cuda.stream(copies):
            forked = torch.cuda.is_current_stream_capturing()
        if forked:  # in this capture: to wait for work outside of it is not allowed
            torch.cuda.current_stream().wait_stream(copies)

    handle = graphcap.hooks.on_capture_exit(join)
    ...
    handle.remove()
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

__all__ = ["Handle", "HookError", "before_replay", "on_capture_enter", "on_capture_exit"]

Hook = Callable[[], object]


class HookError(RuntimeError):
    """A hook has raised while a graph was captured."""


class Handle:
    """One registration."""

    def __init__(self, remove: Callable[[], None]) -> None:
        self._remove = remove

    def remove(self) -> None:
        """Do not call the hook any more. Calling this again does nothing."""
        self._remove()


class HookList:
    """The hooks of one kind.

    Attributes:
        functions: the hooks in order; a change makes a new tuple.
        on_change: called after every change.
    """

    def __init__(self, kind: str) -> None:
        self.functions: tuple[Hook, ...] = ()
        self.on_change: list[Callable[[], None]] = []
        self._kind = kind
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._registered: dict[int, Hook] = {}

    def add(self, function: Hook) -> Handle:
        """Call the function from now on; registered twice it is called twice."""
        if not callable(function):
            raise TypeError(f"{self._kind}: expected a function without arguments, got {function!r}")
        number = next(self._numbers)
        with self._lock:
            self._registered[number] = function
        self._changed()
        return Handle(lambda: self._remove(number))

    def run(self) -> None:
        """Call all of them.

        Raises:
            HookError: naming the hook that raised.
        """
        for function in self.functions:
            try:
                function()
            except Exception as error:
                name = getattr(function, "__qualname__", repr(function))
                raise HookError(f"the {self._kind} hook {name} raised {type(error).__name__}: {error}") from error

    def _remove(self, number: int) -> None:
        with self._lock:
            self._registered.pop(number, None)
        self._changed()

    def _changed(self) -> None:
        with self._lock:
            self.functions = tuple(self._registered.values())
        for listener in self.on_change:
            listener()


capture_enter = HookList("on_capture_enter")
capture_exit = HookList("on_capture_exit")
replay = HookList("before_replay")


def on_capture_enter(function: Hook) -> Handle:
    """Call ``function()`` before every graph capture begins, on the caller's stream.

    Returns:
        A handle whose ``remove()`` ends it.

    Raises:
        TypeError: it cannot be called.
    """
    return capture_enter.add(function)


def on_capture_exit(function: Hook) -> Handle:
    """Call ``function()`` inside every graph capture just before it ends, on the recording stream.

    Returns:
        A handle whose ``remove()`` ends it.

    Raises:
        TypeError: it cannot be called.
    """
    return capture_exit.add(function)


def before_replay(function: Hook) -> Handle:
    """Call ``function()`` before every run of a plan, outside of any capture, on the caller's stream.

    Returns:
        A handle whose ``remove()`` ends it.

    Raises:
        TypeError: it cannot be called.
    """
    return replay.add(function)
