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
from typing import Any, NamedTuple

from graphcap.cudagraph.agreement import Agreement, alone
from graphcap.cudagraph.dispatch.revision import revise
from graphcap.cudagraph.hardware.device import GraphDevice

RECENT_USES = 64  #: a plan that was among the last so many uses of the device is not dropped for another one
_FIRST_PAUSE = 4  #: calls of a key that was refused, until it may ask again; twice as many each time


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


@dataclass(slots=True)
class _Refusal:
    """Why a key has no plan: what it would take, and what has to change before it is tried again."""

    reason: str
    needed: int
    num_calls: int
    num_closed: int  # plans that had gone at that time; -1: it may be tried again whatever has gone


class Room:
    """What one runner may take of a device: it asks before a capture and says afterwards what that took.

    A key that was refused asks again after 4 more calls, then after 8, 16 and so on: a full device costs little. In a
    group all ranks ask, and a key that one of them has no room for is refused on all.
    """

    def __init__(self, device: GraphDevice, max_graph_bytes: int | None, agreement: Agreement = alone) -> None:
        """Limit the device to ``max_graph_bytes``; ``None`` is the device's own default."""
        self._device = device
        self._agreement = agreement
        self._account = device.account
        self._limit = device.default_limit() if max_graph_bytes is None else max_graph_bytes
        self._refusals: dict[Any, _Refusal] = {}
        self._expected = 0  # exclusive bytes of the latest plan: what the next one is taken to need
        if self._limit is not None:
            self._account.ceiling = max(self._account.ceiling or 0, self._limit)

    def closed(self, key: Any) -> str:
        """Why this key is not to be captured now, ``""`` when :meth:`make` may be asked. Counts the calls."""
        refusal = self._refusals.get(key)
        if refusal is None:
            return ""
        refusal.num_calls += 1
        return refusal.reason if refusal.num_calls & (refusal.num_calls - 1) else ""

    def make(self, key: Any) -> Usage | str:
        """Drop plans for one more, if it takes that. The device is locked and entered.

        Returns:
            What is in use then; or why there is no room.
        """
        refusal, standing = self._refusals.get(key), ""
        if refusal is not None:
            if refusal.num_closed == self._account.num_closed:
                standing = refusal.reason
                if not self._agreement.is_group:
                    return standing
            self._device.trim()
        needed = self._expected if refusal is None else refusal.needed
        used, num_closed = self._device.usage(), self._account.num_closed
        reason = self._make_room(key, needed, used.shared, standing)
        if reason and not standing:
            self._refuse(key, reason, needed, -1)
        return reason or (used if self._account.num_closed == num_closed else self._device.usage())

    def take(self, key: Any, grown: Usage, shared: int, drop: Callable[[], None]) -> Holding | str:
        """Enter a new plan into the account; called once its memory has been taken, before it is used.

        Args:
            key: of the plan.
            grown: what it has taken.
            shared: what the device shares now, in bytes.
            drop: gives up the plan.

        Returns:
            The plan's holding, or the reason why the plan must be thrown away.
        """
        reason = self._make_room(key, grown.exclusive, shared)
        if reason:
            is_first = not self._account.holdings()  # then the pool goes as well, and has to be made again
            self._refuse(key, reason, grown.exclusive + (grown.shared if is_first else 0), -1)
            return reason
        self._refusals.pop(key, None)
        self._expected = grown.exclusive
        return self._account.open(grown.exclusive, self._device, drop, self._agreement)

    def out_of_memory(self, key: Any) -> str:
        """A capture of this key has run out of memory: try once more later, then only when a plan has gone.

        Returns:
            The reason why the key runs live until then.
        """
        reason = f"no room: {self._device.name} ran out of memory during a capture"
        first = key not in self._refusals
        num_closed = -1 if first else self._account.num_closed
        self._refuse(key, reason, 0, num_closed)
        if not first and not self._agreement.is_group:
            self._account.drop_oldest(self._device)
        return reason

    def clear(self) -> None:
        """Forget what was refused."""
        self._refusals.clear()
        revise()

    def _make_room(self, key: Any, needed: int, shared: int, standing: str = "") -> str:
        limit, account, agreement = self._limit, self._account, self._agreement
        if not agreement.is_group:
            return "" if limit is None else account.make_room(limit, needed, self._device, shared)
        mine: int | str = standing
        if not standing:
            mine = 0 if limit is None else account.num_to_give_up(limit, needed, self._device, shared, agreement)
        question = f"room for {key}"
        reason = agreement.reason(question, mine if isinstance(mine, str) else "")
        if not reason:
            numbers = agreement.gather(question, mine if isinstance(mine, int) else 0, usual=0)
            account.give_up(max(numbers), self._device, agreement)
        return reason

    def _refuse(self, key: Any, reason: str, needed: int, num_closed: int) -> None:
        before = self._refusals.get(key)
        num_calls = _FIRST_PAUSE if before is None else before.num_calls
        self._refusals[key] = _Refusal(reason, needed, num_calls, num_closed)
        revise()
