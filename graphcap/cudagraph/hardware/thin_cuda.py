"""Pages of a GPU, mapped through the CUDA driver, which allows one block at many addresses.

Kernels that follow each other see what was written through any address; within one kernel two addresses of one block
are not coherent.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Collection
from functools import cache
from typing import Any

import torch

_PINNED, _ON_DEVICE, _READ_WRITE, _MINIMUM = 1, 1, 3, 0  #: of the driver's enums
_OUT_OF_MEMORY = 2


class _Location(ctypes.Structure):
    """CUmemLocation."""

    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Properties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("windows_data", ctypes.c_void_p),
        ("compression", ctypes.c_ubyte),
        ("remote_access", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    )


class _Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", _Location), ("flags", ctypes.c_int))


class CudaPages:
    """See :class:`~graphcap.cudagraph.hardware.thin.Pages`. A block is a handle of the driver."""

    def __init__(self, device: torch.device) -> None:
        """``device`` has an index.

        Raises:
            RuntimeError: there is no driver, or one that maps no memory.
        """
        self._device = device
        self._location = _Location(_ON_DEVICE, device.index)
        self._properties = _Properties(type=_PINNED, location=self._location)
        with torch.cuda.device(device):
            torch.cuda.synchronize()  # its context exists from here on
        found = ctypes.c_size_t()
        self._call("cuMemGetAllocationGranularity", ctypes.byref(found), ctypes.byref(self._properties), _MINIMUM)
        self.page_bytes = found.value

    def reserve(self, nbytes: int) -> int:
        """Addresses without memory."""
        found = ctypes.c_uint64()
        self._call("cuMemAddressReserve", ctypes.byref(found), nbytes, 0, 0, 0)
        return found.value

    def make(self, nbytes: int) -> int:
        """Memory of the device. Where there is none, torch gives back first what it has cached."""
        found = ctypes.c_uint64()
        arguments = (ctypes.byref(found), nbytes, ctypes.byref(self._properties), 0)
        try:
            self._call("cuMemCreate", *arguments)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            self._call("cuMemCreate", *arguments)
        return found.value

    def drop(self, block: int) -> None:
        """Release the handle."""
        self._call("cuMemRelease", block)

    def map(self, block: int, address: int, nbytes: int) -> None:
        """Map the handle."""
        self._call("cuMemMap", address, nbytes, 0, block, 0)

    def allow(self, address: int, nbytes: int) -> None:
        """Let the device read and write."""
        self._call("cuMemSetAccess", address, nbytes, ctypes.byref(_Access(self._location, _READ_WRITE)), 1)

    def give_back(self, address: int, nbytes: int, mapped: Collection[tuple[int, int]]) -> None:
        """Unmap every part, when the device has nothing to do any more."""
        with contextlib.suppress(RuntimeError), torch.cuda.device(self._device):
            if not torch.cuda.is_current_stream_capturing():
                torch.cuda.synchronize()
        with contextlib.suppress(RuntimeError):  # nobody could do anything about it
            for start, size in mapped:
                self._call("cuMemUnmap", start, size)
            self._call("cuMemAddressFree", address, nbytes)

    def tensor(self, address: int, nbytes: int, owner: object) -> torch.Tensor:
        """Over an array that keeps the owner."""
        with torch.inference_mode(False):
            return torch.as_tensor(_Array(address, nbytes, owner), device=self._device)

    def _call(self, name: str, *arguments: Any) -> None:
        with torch.cuda.device(self._device):
            result = getattr(_driver(), name)(*arguments)
        if result == _OUT_OF_MEMORY:
            raise torch.OutOfMemoryError(f"{name}: the device has no more memory")
        if result:
            raise RuntimeError(f"{name} failed with the driver's error {result}")


class _Array:
    """What torch takes for an array in memory of the device."""

    def __init__(self, address: int, nbytes: int, owner: object) -> None:
        self.owner = owner
        self.__cuda_array_interface__ = {
            "shape": (nbytes,), "typestr": "|u1", "data": (address, False), "strides": None, "version": 2
        }  # fmt: skip


@cache
def _driver() -> ctypes.CDLL:
    """The driver that torch uses.

    Raises:
        RuntimeError: there is none, or one that maps no memory.
    """
    size, number, pointer, flags = ctypes.c_size_t, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_uint64
    arguments = {
        "cuMemGetAllocationGranularity": (pointer, pointer, ctypes.c_int),
        "cuMemAddressReserve": (pointer, size, size, number, flags),
        "cuMemAddressFree": (number, size),
        "cuMemCreate": (pointer, size, pointer, flags),
        "cuMemRelease": (number,),
        "cuMemMap": (number, size, size, number, flags),
        "cuMemUnmap": (number, size),
        "cuMemSetAccess": (number, size, pointer, size),
    }
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        for name, types in arguments.items():
            getattr(driver, name).argtypes = types
    except (OSError, AttributeError) as error:
        raise RuntimeError(f"the CUDA driver cannot map memory: {error}") from error
    return driver
