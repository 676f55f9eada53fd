"""All device objects of the process, and what they have in common: a lock, an account, hooks, static memory."""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import cast

import torch

from graphcap.cudagraph.hardware import hooks
from graphcap.cudagraph.hardware.account import Account
from graphcap.cudagraph.hardware.device import GraphDevice, Lock
from graphcap.cudagraph.private import StorageWatch

_devices: weakref.WeakSet[Device] = weakref.WeakSet()
_lock = threading.Lock()


class Device:
    """The part of a :class:`~graphcap.cudagraph.hardware.device.GraphDevice` that does not depend on the hardware."""

    def __init__(self, name: str, device: torch.device, account: Account | None) -> None:
        """Open a device.

        Args:
            name: for reports.
            device: where its tensors are.
            account: of the hardware, where another object stands for a part of it already.
        """
        self.name = name
        self.device = device
        self.lock: Lock = threading.RLock()
        self.busy = False
        self.unusable = ""
        self.account = account or Account(name)
        self._static = StorageWatch()
        self._before_replay: Sequence[Callable[[], object]] = ()
        self.account.add_device(cast(GraphDevice, self))
        with _lock:
            _devices.add(self)
        self.call_before_replay(hooks.replay.functions)

    def enter(self) -> bool:
        """See :class:`graphcap.cudagraph.hardware.device.GraphDevice`."""
        raise NotImplementedError

    def call_before_replay(self, functions: Sequence[Callable[[], object]]) -> None:
        """See ``GraphDevice``. Without a hook, ``enter`` is the plain method."""
        self._before_replay = functions
        if self.unusable:
            return
        if functions:
            self.enter = self._enter_with_hooks  # type: ignore[method-assign]
        else:
            vars(self).pop("enter", None)

    def _enter_with_hooks(self) -> bool:
        entered = type(self).enter(self)
        if entered:
            for function in self._before_replay:
                function()
        return entered

    def forked(self) -> None:
        """See :class:`graphcap.cudagraph.hardware.device.GraphDevice`."""
        self.lock = threading.RLock()
        self.busy = False
        self.account.renew_lock()


def all_devices() -> list[Device]:
    """Those that are alive, in no order."""
    with _lock:
        return list(_devices)


def drop_all_plans() -> None:
    """Drop every plan of the process without waiting for anything.

    At the end of the process, because a graph that has recorded NCCL work must be gone before its communicator is.
    """
    for device in all_devices():
        with contextlib.suppress(Exception):  # the GPU may be in any state
            device.account.drop_all()


def _tell_devices() -> None:
    for device in all_devices():
        device.call_before_replay(hooks.replay.functions)


def _after_fork() -> None:
    for device in all_devices():
        device.forked()


hooks.replay.on_change.append(_tell_devices)
atexit.register(drop_all_plans)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
