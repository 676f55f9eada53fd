"""Recordings of CUDA graphs through torch, and the pool of memory that they allocate from.

Only what torch 2.11 offers is used, and ``capture_begin``/``capture_end`` directly: the context manager
``torch.cuda.graph`` synchronises the device and empties the cache for each capture, which a plan of many segments
cannot afford.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from graphcap.cudagraph.hardware.device import UnjoinedStreamError
from graphcap.cudagraph.private import end_allocation_to_pool

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
        self._num_recordings = 0
        self._measured: tuple[int, int] | None = None
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

    def note_recording(self) -> None:
        """Something is recorded that allocates here."""
        self._num_recordings += 1

    def nbytes(self) -> int:
        """What the pool has taken from the device, its free blocks included.

        Only recordings take more, and nothing is given back before the pool goes: so it is looked up once after them. A
        pool of the user may grow at any time.
        """
        if self._measured is None or self._measured[0] != self._num_recordings or self._backing is not None:
            segments = torch.cuda.memory_snapshot(self.handle)
            found = sum(segment["total_size"] for segment in segments if segment["device"] == self._index)
            self._measured = self._num_recordings, found
        return self._measured[1]


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
        pool.note_recording()
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
