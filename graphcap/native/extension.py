"""Which implementation of the checks is used: Python's, until the extension is there."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, TypeVar, cast

import torch

from graphcap.environment import NATIVE, native_wanted
from graphcap.errors import ConfigError
from graphcap.native import fallback
from graphcap.native.build import BuildError
from graphcap.native.loader import find, find_or_build

_log = logging.getLogger(__name__)
_Owner = TypeVar("_Owner")


class AddressCheck(Protocol):
    """See :class:`graphcap.native.fallback.AddressCheck` and ``ApartCheck``."""

    def __call__(self, args: tuple[Any, ...] | list[Any], /) -> bool: ...


class IdentityCheck(Protocol):
    """See :class:`graphcap.native.fallback.IdentityCheck`."""

    def __call__(self, *arguments: dict[Any, Any]) -> bool: ...

    def clear(self) -> None: ...


class Extension:
    """The extension of a process, or why there is none. Safe to use from several threads; nothing here raises because
    a build fails."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._module: ModuleType | None = None
        self._asked = False
        self._status = "python: the extension is built when a first CUDA graph is captured"
        self._waiting: weakref.WeakKeyDictionary[Any, Callable[[Any], None]] = weakref.WeakKeyDictionary()

    def address_check(self, indices: Sequence[int], addresses: Sequence[int]) -> AddressCheck:
        """A check that tensors still begin at these addresses; contract and errors: ``fallback.AddressCheck``."""
        return cast(AddressCheck, self._implementation().AddressCheck(indices, addresses))

    def identity_check(self, entries: Sequence[fallback.Entry], sized: Sequence[fallback.Sized] = ()) -> IdentityCheck:
        """A check that dicts still hold these very objects; contract and errors: ``fallback.IdentityCheck``."""
        return cast(IdentityCheck, self._implementation().IdentityCheck(entries, sized))

    def answer_check(self, questions: Sequence[fallback.Question]) -> Callable[[], bool]:
        """A check that functions answer what they answered; contract and errors: ``fallback.AnswerCheck``."""
        return cast(Callable[[], bool], self._implementation().AnswerCheck(questions))

    def state_check(
        self,
        roots: Sequence[object],
        entries: Sequence[fallback.Entry],
        sized: Sequence[dict[Any, Any]],
        objects: Sequence[object],
        tensors: Sequence[torch.Tensor],
    ) -> Callable[..., bool] | None:
        """A check that nothing was written to these dicts and objects; contract: ``fallback.StateCheck``. ``None``
        where nobody tells of writes: without the extension, before Python 3.12, and for some dicts."""
        if self._module is None:
            return None
        try:
            made: Callable[..., bool] = self._module.StateCheck(roots, entries, sized, objects, tensors)
            return made
        except (TypeError, ValueError) as reason:
            _log.info("state is not watched: %s", reason)
            return None

    def thread_state(self) -> Callable[[], bool]:
        """A check that torch's modes are those of now; contract: ``fallback.ThreadState``."""
        return cast(Callable[[], bool], self._implementation().ThreadState())

    def apart_check(self, indices: Sequence[int], addresses: Sequence[int]) -> AddressCheck:
        """A check that tensors lie in other storages; contract and errors: ``fallback.ApartCheck``."""
        return cast(AddressCheck, self._implementation().ApartCheck(indices, addresses))

    def grouped_copy(self, targets: Sequence[torch.Tensor], indices: Sequence[int]) -> Callable[[Any], None]:
        """Copies arguments into tensors of one dtype; contract and errors: ``fallback.GroupedCopy``."""
        return cast(Callable[[Any], None], self._implementation().GroupedCopy(targets, indices))

    def when_ready(self, owner: _Owner, update: Callable[[_Owner], None]) -> None:
        """Call ``update(owner)`` once the extension is there, to make ``owner``'s checks anew: at once, later from
        another thread, or never. ``owner`` (hashed, weakly held, one update each) need not live that long;
        ``update`` must not refer to it."""
        with self._lock:
            if self._module is None:
                self._waiting[owner] = update
                return
        update(owner)

    def status(self) -> str:
        """``"extension"``, ``"building"``, or ``"python: "`` and why."""
        return self._status

    def prepare(self, root: Path) -> None:
        """Start to get the extension in a thread of its own, found below ``root`` or built into it; returns at once.

        The first call counts. To be called when a first CUDA graph is captured: nobody else has microseconds to win.
        """
        with self._lock:
            if self._asked:
                return
            self._asked = True
        try:
            if not native_wanted(os.environ):
                self._status = f"python: {NATIVE}=0"
                return
            self._status = "building"
            threading.Thread(target=self._get, args=(root,), name="graphcap-native", daemon=True).start()
        except Exception as error:
            self._give_up(error)

    def look(self, root: Path) -> str:
        """The status that :meth:`prepare` would lead to, as far as that can be told without building."""
        try:
            if not native_wanted(os.environ):
                return f"python: {NATIVE}=0"
            return self._status if find(root) is None else "extension"
        except (BuildError, ConfigError, ImportError, OSError) as error:
            return f"python: {error}"

    def _get(self, root: Path) -> None:
        try:
            module = find_or_build(root)
        except Exception as error:
            self._give_up(error)
            return
        with self._lock:
            self._module, self._status = module, "extension"
            waiting = list(self._waiting.items())
            self._waiting.clear()
        for owner, update in waiting:
            try:
                update(owner)
            except Exception:  # what it has keeps working
                _log.warning("%r keeps its checks in Python", owner, exc_info=True)

    def _give_up(self, error: Exception) -> None:
        _log.info("checks of addresses and identities run in Python: %s", error)
        self._status = f"python: {error}"  # last: who waits for it finds the reason told

    def _implementation(self) -> ModuleType:
        return self._module or fallback
