"""CUDA graphs through torch: one side stream that records and one pool for each device.

Only what torch 2.11 offers is used, and ``capture_begin``/``capture_end`` directly: the context manager
``torch.cuda.graph`` synchronises the device and empties the cache for each capture, which a plan of many segments
cannot afford. Nothing executes on the recording stream; graphs are launched on the caller's.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from graphcap.cudagraph.device import Pool
from graphcap.cudagraph.private import current_raw_stream, end_allocation_to_pool

#: Graphs whose capture_end failed. torch may keep pointers to them in its allocators, so they are never destroyed.
_aborted: list[torch.cuda.CUDAGraph] = []


class CudaPool:
    """A pool of graph memory that exists as long as this object does: a small graph inside keeps it in use.

    Making one also proves that recording works on the device: allocation, generators and stream.
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.handle: Any = torch.cuda.graph_pool_handle()
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.stream(stream):
            self._scratch = torch.ones(1, device=stream.device)
            stream.synchronize()
            recording = CudaRecording(stream, self)
            try:
                self._scratch.zero_()
                self._replay_anchor = recording.end().replay
            except BaseException:
                recording.abort()
                raise
            self._replay_anchor()
            if self._scratch.item() != 0:
                raise RuntimeError("a recorded CUDA graph had no effect when it was launched")


class CudaSegment:
    """A finished recording."""

    def __init__(self, graph: torch.cuda.CUDAGraph, pool: CudaPool) -> None:
        self.replay = graph.replay
        self._pool = pool  # its anchor must outlive this graph


class CudaRecording:
    """A recording in progress; the recording stream is current from here to the end."""

    def __init__(self, stream: torch.cuda.Stream, pool: CudaPool, on_abort: Callable[[], None] | None = None) -> None:
        self._pool = pool
        self._index = stream.device.index
        self._on_abort = on_abort
        self._open = True
        self._graph = torch.cuda.CUDAGraph()
        self._current = torch.cuda.stream(stream)
        self._current.__enter__()
        try:
            self._graph.capture_begin(pool=pool.handle, capture_error_mode="thread_local")
        except BaseException:
            self.abort()
            raise

    def call(self, fn: Callable[..., Any], args: Sequence[Any]) -> Sequence[Any]:
        """See :class:`graphcap.cudagraph.device.Recording`."""
        results: Sequence[Any] = fn(*args)
        return results

    def release(self, tensor: torch.Tensor) -> None:
        """Nothing to do: the allocator sees the last reference go."""

    def end(self) -> CudaSegment:
        """See :class:`graphcap.cudagraph.device.Recording`."""
        self._open = False
        self._graph.capture_end()
        self._current.__exit__(None, None, None)
        return CudaSegment(self._graph, self._pool)

    def abort(self) -> None:
        """See :class:`graphcap.cudagraph.device.Recording`."""
        if self._open:
            self._open = False
            with contextlib.suppress(Exception):  # invalidated: what follows undoes what capture_end left undone
                self._graph.capture_end()
        if end_allocation_to_pool(self._index, self._pool.handle):
            _aborted.append(self._graph)
        self._current.__exit__(None, None, None)
        if self._on_abort is not None:
            self._on_abort()


class CudaDevice:
    """See :class:`graphcap.cudagraph.device.GraphDevice`."""

    def __init__(self, index: int) -> None:
        self.name = f"cuda:{index}"
        self.device = torch.device("cuda", index)
        self.lock: AbstractContextManager[Any] = threading.RLock()
        self.busy = False
        self._index = index
        self._stream = torch.cuda.Stream(self.device)
        self._pool: weakref.ref[CudaPool] | None = None
        self._raw_stream = current_raw_stream()
        self._last_handle: int | None = None
        self._last_stream: torch.cuda.Stream | None = None
        self._primed = threading.local()

    def enter(self) -> bool:
        """See :class:`graphcap.cudagraph.device.GraphDevice`."""
        if torch.cuda.is_current_stream_capturing():
            return False
        handle = self._raw_stream(self._index)
        if handle != self._last_handle:
            current = torch.cuda.current_stream(self._index)
            if self._last_stream is not None:
                current.wait_stream(self._last_stream)
            self._last_handle, self._last_stream = handle, current
        return True

    @contextmanager
    def session(self) -> Iterator[Pool]:
        """No garbage collection while recording: it might free CUDA memory of somebody else in the middle."""
        collecting = gc.isenabled()
        gc.disable()
        try:
            self._prime()
            yield self._pool_in_use()
        finally:
            if collecting:
                gc.enable()

    def _pool_in_use(self) -> CudaPool:
        pool = self._pool() if self._pool else None
        if pool is None:
            gc.collect()
            pool = CudaPool(self._stream)
            self._pool = weakref.ref(pool)
        return pool

    def _prime(self) -> None:
        """Let the linear algebra libraries allocate their workspaces for this thread and stream, outside any pool."""
        if getattr(self._primed, "done", False):
            return
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.stream(self._stream):
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                square = torch.ones(16, 16, device=self.device, dtype=dtype)
                torch.mm(square, square)
                torch.nn.functional.linear(square, square, square[0])
            self._stream.synchronize()
        self._primed.done = True

    def begin(self, pool: Any, released: Sequence[torch.Tensor]) -> CudaRecording:
        """Start recording on the side stream."""
        return CudaRecording(self._stream, pool, self._retire_pool)

    def _retire_pool(self) -> None:
        """Later captures take a new pool. The recording that opens one also brings the generators back: torch marks
        them as recording when one begins, and leaves the mark when it cannot be ended."""
        self._pool = None
        with torch.inference_mode(False):
            saved = torch.cuda.default_generators[self._index].clone_state()
        try:
            CudaPool(self._stream)
        except Exception:
            torch.cuda.default_generators[self._index].graphsafe_set_state(saved)

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Memory of the recording stream: only plans use it, and they wait for each other on whatever stream."""
        with torch.inference_mode(False), torch.cuda.stream(self._stream):
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def at_end(self, segments: Sequence[Any], lent: Collection[int]) -> Callable[[], None] | None:
        """Nothing to do."""
        return None

    def used_bytes(self) -> int:
        """What the driver says, graphs included; other processes on the device count as well."""
        free, total = torch.cuda.mem_get_info(self._index)
        return total - free
