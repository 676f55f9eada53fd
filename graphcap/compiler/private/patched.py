"""Functions of torch that are others while something is traced or compiled."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

#: What is patched in this room was mended in torch 2.13.
IS_NEEDED = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)


class Patched:
    """A method, or a function in a table, that is replaced within ``with``, also for other threads, as long as one of
    them is inside.

    It is put back as it was when the last one has left, so that compilations that are none of ours do not meet it.
    """

    def __init__(self, name: Any, make: Callable[[Any], Any]) -> None:
        """Nothing is replaced yet.

        Args:
            name: of the method, or the key in the table.
            make: takes what the class or table holds under that name, and returns what it shall hold instead.
        """
        self._name = name
        self._make = make
        self._lock = threading.Lock()
        self._inside = 0
        self._before: Any = None

    @contextlib.contextmanager
    def within(self, owner: type | dict[Any, Any]) -> Iterator[None]:
        """Replace what ``owner`` holds, which is the same class or table at every use."""
        with self._lock:
            if not self._inside:
                self._before = owner[self._name] if isinstance(owner, dict) else owner.__dict__[self._name]
                self._put(owner, self._make(self._before))
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self._put(owner, self._before)
                    self._before = None

    def _put(self, owner: type | dict[Any, Any], function: Any) -> None:
        if isinstance(owner, dict):
            owner[self._name] = function
        else:
            setattr(owner, self._name, function)
