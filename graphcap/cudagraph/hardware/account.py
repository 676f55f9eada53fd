"""The account of one device: what each plan holds of its memory, and which plan gives way when there is no more room.

Two kinds of bytes are told apart. *Exclusive* ones go when their plan goes: the executable graphs. *Shared* ones (the
pool, workspaces, static buffers) stay for the plans that are left, so dropping a plan is never credited with them.

Only a plan that was not among the last users of the device gives way. Otherwise a set of shapes that does not fit into
the budget would be captured and dropped for ever; this way the first ones stay and the rest runs live.

The plans of a process group give way together: each rank says how many of them would have to go, and all drop as many
of those that were used longest ago, which are the same ones on every rank. They never give way to anybody outside.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from graphcap.cudagraph.agreement import Agreement, alone
from graphcap.cudagraph.hardware.device import GraphDevice

RECENT_USES = 64  #: a plan that was among the last so many uses of the device is not dropped for another one


class Usage(NamedTuple):
    """Bytes of device memory. Of two readings only the difference means something."""

    exclusive: int
    shared: int

    def since(self, before: Usage) -> Usage:
        """The growth, never below 0: others on the device may have given memory back in the meantime."""
        return Usage(max(0, self.exclusive - before.exclusive), max(0, self.shared - before.shared))


@dataclass(slots=True, eq=False, weakref_slot=True)
class Holding:
    """What one plan holds. The plan keeps it alive; when the plan is gone, so is the holding.

    Attributes:
        exclusive_bytes: what dropping the plan gives back.
        device: where the plan runs.
        drop: gives up the plan. The holding does not keep the plan's runner alive.
        last_use: when the plan ran last, in uses of the account.
        agreement: with whom it must be agreed that the plan goes.
        is_dropped: whether the plan has been given up, though somebody still refers to it.
    """

    exclusive_bytes: int
    device: GraphDevice
    drop: Callable[[], None]
    last_use: int
    agreement: Agreement = alone
    is_dropped: bool = False


class Account:
    """What the plans of one device hold, those of private pools included.

    Attributes:
        name: of the device, for reports.
        tick: numbers the uses of the device.
        ceiling: the largest limit among the runners, in bytes; ``None`` while there is none, or no limit.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.tick = itertools.count(1).__next__
        self.ceiling: int | None = None
        self._lock = threading.Lock()
        self._num_opened = 0
        self._holdings: weakref.WeakSet[Holding] = weakref.WeakSet()
        self._devices: weakref.WeakSet[GraphDevice] = weakref.WeakSet()

    def add_device(self, device: GraphDevice) -> None:
        """Count what this device object shares between its plans."""
        with self._lock:
            self._devices.add(device)

    def open(
        self, exclusive_bytes: int, device: GraphDevice, drop: Callable[[], None], agreement: Agreement = alone
    ) -> Holding:
        """A plan has been captured."""
        holding = Holding(exclusive_bytes, device, drop, self.tick(), agreement)
        with self._lock:
            self._holdings.add(holding)
            self._num_opened += 1
        return holding

    def holdings(self) -> list[Holding]:
        """Those of the plans that are alive, the one that was used longest ago first."""
        with self._lock:
            return sorted(self._holdings, key=lambda holding: holding.last_use)

    @property
    def num_closed(self) -> int:
        """How many plans have gone so far."""
        with self._lock:
            return self._num_opened - len(self._holdings)

    def exclusive_bytes(self) -> int:
        """Of all plans together."""
        return sum(holding.exclusive_bytes for holding in self.holdings())

    def shared_bytes(self) -> int:
        """Pools, workspaces and static buffers."""
        return sum(device.shared_bytes() for device in self._all_devices())

    def used_bytes(self, asking: GraphDevice, shared: int) -> int:
        """Exclusive and shared bytes together, where it is known what one of the device objects shares: to read that
        takes the host as long as many launches."""
        others = sum(device.shared_bytes() for device in self._all_devices() if device is not asking)
        return self.exclusive_bytes() + others + shared

    def _all_devices(self) -> list[GraphDevice]:
        with self._lock:
            return list(self._devices)

    def make_room(self, limit: int, needed: int, asking: GraphDevice, shared: int) -> str:
        """Drop plans until ``needed`` more bytes fit below ``limit``, or none if that would not be enough.

        ``asking`` is locked by the caller, and its stream ordered behind the plans that may go; it shares ``shared``
        bytes.

        Returns:
            Why there is no room, ``""`` when there is.
        """
        used = self.used_bytes(asking, shared)
        missing = used + needed - limit
        victims, credit = [], 0
        for holding in self._cold():
            if credit >= missing:
                break
            if holding.exclusive_bytes:
                victims.append(holding)
                credit += holding.exclusive_bytes
        if credit < missing:
            return self._no_room(limit, used, needed)
        freed = sum([holding.exclusive_bytes for holding in victims if _give_up(holding, asking)])
        return "" if freed >= missing else f"no room: plans on {self.name} that could give way are in use"

    def drop_oldest(self, asking: GraphDevice) -> bool:
        """Drop the plan that was used longest ago, if that is long enough. Returns whether one went."""
        return any(_give_up(holding, asking) for holding in self._cold()[:1])

    def num_to_give_up(
        self, limit: int, needed: int, asking: GraphDevice, shared: int, agreement: Agreement
    ) -> int | str:
        """How many plans of a group on ``asking``, which shares ``shared`` bytes, would have to go until ``needed``
        more bytes fit below ``limit``; or why that would not be enough. Nothing goes."""
        used = self.used_bytes(asking, shared)
        missing, credit, number = used + needed - limit, 0, 0
        for holding in self._cold(asking, agreement):
            if credit >= missing:
                break
            number, credit = number + 1, credit + holding.exclusive_bytes
        return number if credit >= missing else self._no_room(limit, used, needed)

    def give_up(self, number: int, asking: GraphDevice, agreement: Agreement) -> None:
        """Drop so many plans of a group on ``asking``, those used longest ago, as all of its ranks do."""
        for holding in self._of(agreement, asking)[:number]:
            _give_up(holding, asking)

    def drop_all(self) -> None:
        """Drop every plan at once, without waiting for anything: the process is about to end."""
        for holding in self.holdings():
            holding.drop()

    def renew_lock(self) -> None:
        """In a forked child, where another thread of the parent may have held it."""
        self._lock = threading.Lock()

    def _cold(self, asking: GraphDevice | None = None, agreement: Agreement = alone) -> list[Holding]:
        """The plans that may go without harm: those of a group on its device, or those of nobody's."""
        holdings = self.holdings()
        latest = holdings[-1].last_use if holdings else 0
        return [each for each in self._of(agreement, asking) if latest - each.last_use >= RECENT_USES]

    def _of(self, agreement: Agreement, device: GraphDevice | None) -> list[Holding]:
        ours = [each for each in self.holdings() if each.agreement is agreement and not each.is_dropped]
        return [each for each in ours if device is None or each.device is device]

    def _no_room(self, limit: int, used: int, needed: int) -> str:
        return f"no room: max_graph_bytes={limit}, graphs on {self.name} hold {used}, this shape needs {needed}"


def _give_up(holding: Holding, asking: GraphDevice) -> bool:
    """Drop a plan when its last replay has finished. False when its device is in use: nobody waits for another lock."""
    device = holding.device
    if device is asking:
        device.wait()
        holding.drop()
        return True
    if not device.lock.acquire(blocking=False):
        return False
    try:
        if device.busy or not device.enter():
            return False
        device.wait()
        holding.drop()
        return True
    finally:
        device.lock.release()
