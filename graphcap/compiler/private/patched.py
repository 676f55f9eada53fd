"""Methods of Inductor that are others while something compiles."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any


class Patched:
    """A method that is replaced within ``with``, also for other threads, as long as one of them is inside.

    It is put back as it was when the last one has left, so that compilations that are none of ours do not meet it.
    """

    def __init__(self, name: str, make: Callable[[Any], Any]) -> None:
        """Nothing is replaced yet.

        Args:
            name: of the method.
            make: takes what the class holds under that name, and returns what it shall hold instead.
        """
        self._name = name
        self._make = make
        self._lock = threading.Lock()
        self._inside = 0
        self._before: Any = None

    @contextlib.contextmanager
    def within(self, owner: type) -> Iterator[None]:
        """Replace the method of ``owner``, which is the same class at every use."""
        with self._lock:
            if not self._inside:
                self._before = owner.__dict__[self._name]
                setattr(owner, self._name, self._make(self._before))
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    setattr(owner, self._name, self._before)
                    self._before = None
