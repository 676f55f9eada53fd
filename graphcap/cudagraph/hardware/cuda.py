"""A CUDA device: one side stream that records and one pool of graph memory.

Nothing executes on the recording stream; graphs are launched on the caller's. Recordings and their pool are in
:mod:`~graphcap.cudagraph.hardware.cuda_recording`.
"""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from graphcap.cudagraph.counters.cost import StepTime
from graphcap.cudagraph.hardware import hooks
from graphcap.cudagraph.hardware.account import Account, Usage
from graphcap.cudagraph.hardware.collector import without_collector
from graphcap.cudagraph.hardware.cuda_recording import CudaPool, CudaRecording
from graphcap.cudagraph.hardware.device import Pool
from graphcap.cudagraph.hardware.devices import Device
from graphcap.cudagraph.hardware.generators import registered
from graphcap.cudagraph.hardware.workspaces import Workspaces
from graphcap.cudagraph.private import current_raw_stream, is_capturing

_DEFAULT_PART = 10  #: graphs may take one part in so many of the device's memory where nobody says


class CudaDevice(Device):
    """See :class:`graphcap.cudagraph.hardware.device.GraphDevice`."""

    def __init__(self, index: int, account: Account | None = None) -> None:
        super().__init__(f"cuda:{index}", torch.device("cuda", index), account)
        self._index = index
        self._stream = torch.cuda.Stream(self.device)
        self._backing: torch.cuda.MemPool | None = None
        self._pool: weakref.ref[CudaPool] | None = None
        self._pools: list[weakref.ref[CudaPool]] = []  # retired ones too, while a plan is left in them
        self._raw_stream = current_raw_stream()
        self._last_handle: int | None = None
        self._last_stream: torch.cuda.Stream | None = None
        self._workspaces = Workspaces(self._stream)

    def enter(self) -> bool:
        """See :class:`graphcap.cudagraph.hardware.device.GraphDevice`."""
        if is_capturing():
            return False
        handle = self._raw_stream(self._index)
        if handle != self._last_handle:
            current = torch.cuda.current_stream(self._index)
            if self._last_stream is not None:
                current.wait_stream(self._last_stream)
            self._last_handle, self._last_stream = handle, current
        return True

    def wait(self) -> None:
        """See :class:`graphcap.cudagraph.hardware.device.GraphDevice`."""
        torch.cuda.current_stream(self._index).synchronize()

    def stopwatch(self, call: Callable[[], object]) -> StepTime:
        """See ``GraphDevice``. The time of the device is that between two events."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(self._index)
        stream.synchronize()
        begin.record(stream)
        started = time.perf_counter()
        call()
        host = time.perf_counter() - started
        end.record(stream)
        end.synchronize()
        return StepTime(host * 1e6, begin.elapsed_time(end) * 1e3)

    @contextmanager
    def session(self) -> Iterator[Pool]:
        """No garbage collection while recording: it might free CUDA memory of somebody else in the middle."""
        with without_collector():
            self._workspaces.prepare()
            yield self._pool_in_use()

    def _pool_in_use(self) -> CudaPool:
        pool = self._pool() if self._pool else None
        if pool is None:
            pool = CudaPool(self._stream, self._backing)
            self._pool = weakref.ref(pool)
            self._pools = [*(each for each in self._pools if each() is not None), self._pool]
        return pool

    def back_with(self, backing: torch.cuda.MemPool | None) -> None:
        """Allocate later captures from a pool of the user, or with ``None`` from one of our own."""
        with self.lock:
            self._backing, self._pool = backing, None

    def begin(self, pool: Any, released: Sequence[torch.Tensor]) -> CudaRecording:
        """Start recording on the side stream."""
        hooks.capture_enter.run()
        generators = registered(self.device)
        return CudaRecording(self._stream, pool, generators, hooks.capture_exit.run, self._retire_pool)

    def _retire_pool(self) -> None:
        """Later captures take a new pool. The recording that opens one also brings the generators back: torch marks
        them as recording when one begins, and leaves the mark when it cannot be ended."""
        self._pool = None
        generators = [torch.cuda.default_generators[self._index], *registered(self.device)]
        with torch.inference_mode(False):
            saved = [generator.clone_state() for generator in generators]
        try:
            CudaPool(self._stream, generators=generators[1:])
        except Exception:
            for generator, state in zip(generators, saved, strict=True):
                generator.graphsafe_set_state(state)

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Memory of the recording stream: only plans use it, and they wait for each other on whatever stream."""
        with torch.inference_mode(False), torch.cuda.stream(self._stream):
            return self._static.add(torch.empty(nbytes, dtype=torch.uint8, device=self.device))

    def at_end(self, segments: Sequence[Any], lent: Collection[int]) -> Callable[[], None] | None:
        """Nothing to do."""
        return None

    def spare_bytes(self) -> int:
        """A quarter of what is free."""
        return torch.cuda.mem_get_info(self._index)[0] // 4

    def used_bytes(self) -> int:
        """What the driver says, graphs included; other processes on the device count as well."""
        free, total = torch.cuda.mem_get_info(self._index)
        return total - free

    def usage(self) -> Usage:
        """What torch's allocator does not know of is taken for graphs, so only differences mean something."""
        statistics = torch.cuda.memory_stats_as_nested_dict(self._index)  # memory_stats flattens hundreds of numbers
        reserved = statistics["reserved_bytes"]["all"]["current"] if statistics else 0
        outside = self.used_bytes() - reserved
        return Usage(outside, self.shared_bytes())

    def shared_bytes(self) -> int:
        """Pools, workspaces of the libraries and static buffers."""
        pools = sum(pool.nbytes() for each in self._pools if (pool := each()) is not None)
        return pools + self._workspaces.nbytes() + self._static.nbytes()

    def default_limit(self) -> int:
        """A tenth of the device's memory."""
        return default_limit(self._index)

    def trim(self) -> None:
        """Torch gives cached memory back by itself when it runs out, but not while a capture is under way; and what
        waits for the garbage collector may hold some.

        Not where there are plans: what a capture then takes cannot leave their pool again, and a live call needs it.
        """
        gc.collect()
        if not any(each() is not None for each in self._pools):
            torch.cuda.empty_cache()

    def forked(self) -> None:
        """CUDA does not work in the child: calls run live there, and torch says so."""
        super().forked()
        self.unusable = f"forked process: CUDA graphs of {self.name} belong to the parent; start children with spawn"
        self.enter = lambda: False  # type: ignore[method-assign]


def default_limit(index: int) -> int:
    """How many bytes graphs may take on a device where nobody says: a tenth of its memory."""
    return int(torch.cuda.get_device_properties(index).total_memory) // _DEFAULT_PART
