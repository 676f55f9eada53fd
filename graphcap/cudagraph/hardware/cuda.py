"""CUDA graphs through torch: one side stream that records and one pool for each device.

Only what torch 2.11 offers is used, and ``capture_begin``/``capture_end`` directly: the context manager
``torch.cuda.graph`` synchronises the device and empties the cache for each capture, which a plan of many segments
cannot afford. Nothing executes on the recording stream; graphs are launched on the caller's.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from graphcap.cudagraph.counters.cost import StepTime
from graphcap.cudagraph.hardware import hooks
from graphcap.cudagraph.hardware.budget import Account, Usage
from graphcap.cudagraph.hardware.collector import without_collector
from graphcap.cudagraph.hardware.device import Pool, UnjoinedStreamError
from graphcap.cudagraph.hardware.devices import Device
from graphcap.cudagraph.hardware.generators import registered
from graphcap.cudagraph.private import current_raw_stream, end_allocation_to_pool

_DEFAULT_PART = 10  #: graphs may take one part in so many of the device's memory where nobody says

#: Graphs whose capture_end failed. torch may keep pointers to them in its allocators, so they are never destroyed.
_aborted: list[torch.cuda.CUDAGraph] = []


class CudaPool:
    """A pool of graph memory that exists as long as this object does: a small graph inside keeps it in use.

    Making one also proves that recording works on the device: allocation, generators and stream.
    """

    def __init__(
        self,
        stream: torch.cuda.Stream,
        backing: torch.cuda.MemPool | None = None,
        generators: Sequence[torch.Generator] = (),
    ) -> None:
        """Open a pool of its own, or allocate from ``backing``, a pool of the user, which then stays alive as long."""
        self._index = stream.device.index
        self.handle: Any = torch.cuda.graph_pool_handle() if backing is None else backing.id
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.stream(stream):
            self._scratch = torch.ones(1, device=stream.device)
            stream.synchronize()
            recording = CudaRecording(stream, self, generators)
            try:
                self._scratch.zero_()
                self._replay_anchor = recording.end().replay
            except BaseException:
                recording.abort()
                raise
            self._replay_anchor()
            if self._scratch.item() != 0:
                raise RuntimeError("a recorded CUDA graph had no effect when it was launched")
        self._backing = backing  # the last attribute, so the last to go: torch insists that nothing uses it by then

    def nbytes(self) -> int:
        """What the pool has taken from the device, its free blocks included."""
        segments = torch.cuda.memory_snapshot(self.handle)
        return sum(segment["total_size"] for segment in segments if segment["device"] == self._index)


class CudaSegment:
    """A finished recording."""

    def __init__(self, graph: torch.cuda.CUDAGraph, pool: CudaPool) -> None:
        self.replay = graph.replay
        self._pool = pool  # its anchor must outlive this graph


class CudaRecording:
    """A recording in progress; the recording stream is current from here to the end."""

    def __init__(
        self,
        stream: torch.cuda.Stream,
        pool: CudaPool,
        generators: Sequence[torch.Generator] = (),
        on_exit: Callable[[], None] | None = None,
        on_abort: Callable[[], None] | None = None,
    ) -> None:
        """Begin.

        Args:
            stream: records.
            pool: what is recorded allocates from it.
            generators: what is recorded may draw from these, besides the default one.
            on_exit: called before the recording ends, with its stream current.
            on_abort: called when torch could not end a recording that is thrown away.
        """
        self._pool = pool
        self._index = stream.device.index
        self._on_exit = on_exit
        self._on_abort = on_abort
        self._open = True
        self._graph = torch.cuda.CUDAGraph()
        self._current = torch.cuda.stream(stream)
        self._current.__enter__()
        try:
            for generator in generators:
                self._graph.register_generator_state(generator)
            self._graph.capture_begin(pool=pool.handle, capture_error_mode="thread_local")
        except BaseException:
            self.abort()
            raise

    def call(self, fn: Callable[..., Any], args: Sequence[Any]) -> Sequence[Any]:
        """See :class:`graphcap.cudagraph.hardware.device.Recording`."""
        try:
            results: Sequence[Any] = fn(*args)
        except RuntimeError as error:
            if "not in capture mode" in str(error):  # torch's words about a generator that the graph does not know
                raise RuntimeError(
                    "it draws from a generator that is not the default one: graphcap.register_generator(generator) "
                    f"before the capture lets graphs know it ({error})"
                ) from error
            raise
        return results

    def release(self, tensor: torch.Tensor) -> None:
        """Nothing to do: the allocator sees the last reference go."""

    def end(self) -> CudaSegment:
        """See :class:`graphcap.cudagraph.hardware.device.Recording`."""
        if self._on_exit is not None:
            self._on_exit()
        self._open = False
        try:
            self._graph.capture_end()
        except RuntimeError as error:
            if "unjoined" in str(error):  # cudaErrorStreamCaptureUnjoined
                raise UnjoinedStreamError(
                    "a side stream that was forked inside of the capture is not joined when it ends: "
                    "torch.cuda.current_stream().wait_stream(side) must follow the last work on it"
                ) from error
            raise
        self._current.__exit__(None, None, None)
        return CudaSegment(self._graph, self._pool)

    def abort(self) -> None:
        """See :class:`graphcap.cudagraph.hardware.device.Recording`.

        Where torch can end the capture (the device ran out of memory, a step raised in Python) it undoes everything
        itself. Where it cannot, the pool is not used for later captures.
        """
        ended = False
        if self._open:
            self._open = False
            # Invalidated, it raises: what follows undoes what capture_end left undone. Empty, it warns of that.
            with contextlib.suppress(Exception), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._graph.capture_end()
                ended = True
        if end_allocation_to_pool(self._index, self._pool.handle):
            _aborted.append(self._graph)
            ended = False
        self._current.__exit__(None, None, None)
        if self._on_abort is not None and not ended:
            self._on_abort()


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
        self._primed = threading.local()
        self._workspace_bytes = 0

    def enter(self) -> bool:
        """See :class:`graphcap.cudagraph.hardware.device.GraphDevice`."""
        if torch.cuda.is_current_stream_capturing():
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
            self._prime()
            yield self._pool_in_use()

    def _pool_in_use(self) -> CudaPool:
        pool = self._pool() if self._pool else None
        if pool is None:
            gc.collect()
            pool = CudaPool(self._stream, self._backing)
            self._pool = weakref.ref(pool)
            self._pools = [*(each for each in self._pools if each() is not None), self._pool]
        return pool

    def back_with(self, backing: torch.cuda.MemPool | None) -> None:
        """Allocate later captures from a pool of the user, or with ``None`` from one of our own."""
        with self.lock:
            self._backing, self._pool = backing, None

    def _prime(self) -> None:
        """Let the linear algebra libraries allocate their workspaces for this thread and stream, outside any pool."""
        if getattr(self._primed, "done", False):
            return
        before = torch.cuda.memory_allocated(self._index)
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.stream(self._stream):
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                square = torch.ones(16, 16, device=self.device, dtype=dtype)
                torch.mm(square, square)
                torch.nn.functional.linear(square, square, square[0])
            self._stream.synchronize()
            del square
        self._workspace_bytes += max(0, torch.cuda.memory_allocated(self._index) - before)
        self._primed.done = True

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
        outside = self.used_bytes() - torch.cuda.memory_reserved(self._index)
        pools = sum(pool.nbytes() for each in self._pools if (pool := each()) is not None)
        return Usage(outside, pools + self._workspace_bytes + self._static.nbytes())

    def default_limit(self) -> int:
        """A tenth of the device's memory."""
        return default_limit(self._index)

    def trim(self) -> None:
        """Torch gives cached memory back by itself when it runs out, but not while a capture is under way.

        Not where there are plans: what a capture then takes cannot leave their pool again, and a live call needs it.
        """
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
