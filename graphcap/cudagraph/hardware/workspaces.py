"""The memory that the linear algebra libraries work in while a stream records.

cuBLAS has a workspace for each thread and stream, and so has cuBLASLt, which adds the bias, where torch does not let
the two share. A graph holds its address: it has to be there as long as the graph, and nobody else may write into it.
But torch keeps the workspaces in a table that anybody may clear, and ``mode="reduce-overhead"`` does for every graph
that it records (``torch._inductor.cudagraph_trees.clear_cublass_cache``). What was cleared is free memory like any
other. A replay would write partial sums into the next tensor that is put there, and find rubbish among its own.

So they are allocated from a pool that nobody else allocates from. Cleared, they go back into it, where graphs may
still work in them, and from where the next ones are taken. That threads may come to share one is no harm: replays wait
for each other. (Only torch's native allocator has such pools. With another one, do not clear them.)
"""

from __future__ import annotations

import contextlib
import threading

import torch


class Workspaces:
    """Those of the threads that record on one stream."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        """Allocate nothing yet."""
        self._stream = stream
        self._device = stream.device
        self._pool: torch.cuda.MemPool | None = None
        self._of_thread = threading.local()
        self._nbytes = 0

    def prepare(self) -> None:
        """Have the libraries allocate what this thread has not, or has no more; before a capture, which would otherwise
        allocate it from the pool of the graphs, where it would be reused when it is cleared.

        They serve every dtype: with more than one, kernels would be loaded that nobody uses.
        """
        if self._pool is None and torch.cuda.get_allocator_backend() == "native":
            self._pool = torch.cuda.MemPool()
        ours = contextlib.nullcontext() if self._pool is None else torch.cuda.use_mem_pool(self._pool, self._device)
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.stream(self._stream):
            square = torch.ones(16, 16, device=self._device, dtype=torch.bfloat16)
            result = torch.empty_like(square)
            with ours:
                torch.mm(square, square, out=result)
                torch.addmm(square[0], square, square, out=result)
        if not getattr(self._of_thread, "has_them", False):
            self._stream.synchronize()  # what a library does at its first call is done before a capture begins
            self._nbytes = self._measure()
            self._of_thread.has_them = True

    def _measure(self) -> int:
        segments = [] if self._pool is None else torch.cuda.memory_snapshot(self._pool.id)
        return sum(each["total_size"] for each in segments if each["device"] == self._device.index)

    def nbytes(self) -> int:
        """What they have taken from the device, where that is known. Those that are made again lie where the cleared
        ones lay."""
        return self._nbytes
