"""A device without hardware: it keeps the rules of a graph capture on the CPU, so that breaking one shows in a test.

Within a recording a call has no effect: it runs on clones of its arguments' storages, and its results are poison until
the segment is replayed. A replay calls the same function with the recorded arguments (same addresses, same numbers)
and writes into the recorded results. Memory that was released is poison from that point of every replay, and all
results of a plan are poison once its outputs have been made, since another plan may have reused them; only what the
plan keeps for its caller is spared.

What it cannot show: Python inside of a function runs again at replay; kernels of compiled code are not seen by the
check for host synchronisation; what a function writes other than its arguments is written during the recording; nothing
is asynchronous. It is slower than running live, always.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from graphcap.cudagraph.hardware import hooks
from graphcap.cudagraph.hardware.account import Account, Usage
from graphcap.cudagraph.hardware.device import Pool, Stopwatch
from graphcap.cudagraph.hardware.devices import Device
from graphcap.cudagraph.hardware.simulated_recording import SimulatedPool, SimulatedRecording


class SimulatedDevice(Device):
    """See :class:`graphcap.cudagraph.hardware.device.GraphDevice`."""

    stopwatch: Stopwatch | None = None  # times say nothing here

    def __init__(self, account: Account | None = None, capacity: int | None = None) -> None:
        """Open a device.

        Args:
            account: of another device that this one is to be a part of.
            capacity: bytes that its recorded results and static buffers may take together; ``None`` is any number.
        """
        super().__init__("simulated", torch.device("cpu"), account)
        self.capacity = capacity
        self._pool: weakref.ref[SimulatedPool] | None = None
        self._pools: list[weakref.ref[SimulatedPool]] = []  # spoilt ones too, while a plan is left in them

    def enter(self) -> bool:
        """Nothing to order: a CPU has no streams."""
        return True

    def wait(self) -> None:
        """Nothing to wait for."""

    @contextmanager
    def session(self) -> Iterator[Pool]:
        """One pool for all plans, gone with the last of them."""
        pool = self._pool() if self._pool else None
        if pool is None or pool.is_spoilt:
            pool = SimulatedPool(self._check_room)
            self._pool = weakref.ref(pool)
            self._pools = [*(each for each in self._pools if each() is not None), self._pool]
        yield pool

    def begin(self, pool: Any, released: Sequence[torch.Tensor]) -> SimulatedRecording:
        """Start recording."""
        hooks.capture_enter.run()
        return SimulatedRecording(pool, released)

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Plain memory, counted against the capacity."""
        self._check_room(nbytes)
        with torch.inference_mode(False):
            return self._static.add(torch.empty(nbytes, dtype=torch.uint8))

    def at_end(self, segments: Sequence[Any], lent: Collection[int]) -> Callable[[], None]:
        """Poison every other result of the plan, as if another plan had reused its memory at once."""
        blocks = [each for segment in segments for each in segment.blocks if each.storage.data_ptr() not in lent]

        def poison() -> None:
            for block in blocks:
                block.poison()

        return poison

    def spare_bytes(self) -> int:
        """A gibibyte."""
        return 2**30

    def used_bytes(self) -> int:
        """The bytes of all recorded results."""
        return sum(pool.nbytes() for each in self._pools if (pool := each()) is not None)

    def usage(self) -> Usage:
        """A plan's results are its own here: nothing reuses their memory. Static buffers are shared."""
        return Usage(self.used_bytes(), self.shared_bytes())

    def shared_bytes(self) -> int:
        """Static buffers."""
        return self._static.nbytes()

    def default_limit(self) -> None:
        """None: nothing here is worth saving."""

    def trim(self) -> None:
        """Nothing is cached."""

    def _check_room(self, nbytes: int) -> None:
        taken = self.used_bytes() + self._static.nbytes()
        if self.capacity is not None and taken + nbytes > self.capacity:
            raise torch.OutOfMemoryError(
                f"simulated device: {nbytes} bytes do not fit, {taken} of {self.capacity} are taken"
            )
