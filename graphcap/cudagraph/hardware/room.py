"""The room that one runner has for its plans: asked for before a capture, taken after it, refused for a while."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from graphcap.cudagraph.agreement import Agreement, alone
from graphcap.cudagraph.dispatch.revision import revise
from graphcap.cudagraph.hardware.account import Holding, Usage
from graphcap.cudagraph.hardware.device import GraphDevice

_FIRST_PAUSE = 4  #: calls of a key that was refused, until it may ask again; twice as many each time


@dataclass(slots=True)
class _Refusal:
    """Why a key has no plan: what it would take, and what has to change before it is tried again."""

    reason: str
    needed: int | None  # None: it was never tried
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
        if self._limit is not None:
            self._account.ceiling = max(self._account.ceiling or 0, self._limit)

    def closed(self, key: Any) -> str:
        """Why this key is not to be captured now, ``""`` when :meth:`make` may be asked. Counts the calls."""
        refusal = self._refusals.get(key)
        if refusal is None:
            return ""
        refusal.num_calls += 1
        return refusal.reason if refusal.num_calls & (refusal.num_calls - 1) else ""

    def make(self, key: Any, guess: int) -> Usage | str:
        """Drop plans for one more, if it takes that. The device is locked and entered.

        Args:
            key: of the plan.
            guess: exclusive bytes that it is taken to need where it was never tried.

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
        tried = None if refusal is None else refusal.needed
        needed = guess if tried is None else tried
        used, num_closed = self._device.usage(), self._account.num_closed
        reason = self._make_room(key, needed, used.shared, standing)
        if reason and not standing:
            self._refuse(key, reason, tried, -1)
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

    def _refuse(self, key: Any, reason: str, needed: int | None, num_closed: int) -> None:
        before = self._refusals.get(key)
        num_calls = _FIRST_PAUSE if before is None else before.num_calls
        self._refusals[key] = _Refusal(reason, needed, num_calls, num_closed)
        revise()
