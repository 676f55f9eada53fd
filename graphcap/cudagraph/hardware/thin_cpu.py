"""Pages of the CPU: what the simulated device stands on where the GPU maps its memory through the driver."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Collection
from functools import cache

import torch

_FIXED, _NO_RESERVE = 0x10, 0x4000  #: MAP_FIXED and MAP_NORESERVE on Linux; Python does not name them all
_FAILED = ctypes.c_void_p(-1).value


class CpuPages:
    """See :class:`~graphcap.cudagraph.hardware.thin.Pages`. A block is a file without a name."""

    page_bytes = mmap.PAGESIZE

    def reserve(self, nbytes: int) -> int:
        """Addresses that nothing may touch yet."""
        return _map(None, nbytes, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE, -1)

    def make(self, nbytes: int) -> int:
        """A file descriptor."""
        file = os.memfd_create("graphcap")
        os.ftruncate(file, nbytes)
        return file

    def drop(self, block: int) -> None:
        """Close the file; where it is mapped it stays."""
        os.close(block)

    def map(self, block: int, address: int, nbytes: int) -> None:
        """Map the file."""
        _map(address, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _FIXED, block)

    def allow(self, address: int, nbytes: int) -> None:
        """It has been allowed when it was mapped."""

    def give_back(self, address: int, nbytes: int, mapped: Collection[tuple[int, int]]) -> None:
        """Unmap all of it."""
        _libc().munmap(address, nbytes)

    def tensor(self, address: int, nbytes: int, owner: object) -> torch.Tensor:
        """Over a buffer that keeps the owner."""
        buffer = (ctypes.c_char * nbytes).from_address(address)
        buffer.owner = owner  # type: ignore[attr-defined]
        with torch.inference_mode(False):
            return torch.frombuffer(buffer, dtype=torch.uint8)


def _map(address: int | None, nbytes: int, access: int, flags: int, file: int) -> int:
    found: int | None = _libc().mmap(address, nbytes, access, flags, file, 0)
    if found is None or found == _FAILED:
        number = ctypes.get_errno()
        if number == errno.ENOMEM:
            raise torch.OutOfMemoryError(f"mmap of {nbytes} bytes: {os.strerror(number)}")
        raise RuntimeError(f"mmap of {nbytes} bytes: {os.strerror(number)}")
    return found


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    size, number = ctypes.c_size_t, ctypes.c_int
    libc.mmap.argtypes = (ctypes.c_void_p, size, number, number, number, ctypes.c_long)
    libc.mmap.restype = ctypes.c_void_p
    libc.munmap.argtypes = (ctypes.c_void_p, size)
    return libc
