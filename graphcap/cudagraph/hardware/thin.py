"""Memory that has the size of a large tensor and the substance of the few pages that are used of it.

A range of addresses is made of pages. Some have memory of their own; all others share a few blocks, the *filler*, which
is mapped again and again. What is written to any address is written somewhere, so that code which knows nothing of this
can be let loose on it: a kernel that takes a pointer and computes its own places.

Where the pages come from: :mod:`~graphcap.cudagraph.hardware.thin_cuda`,
:mod:`~graphcap.cudagraph.hardware.thin_cpu`.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator
from typing import Any, Protocol

import torch


class Pages(Protocol):
    """Addresses and memory of one device.

    Attributes:
        page_bytes: the smallest block that can be mapped; all sizes here are multiples of it.
    """

    page_bytes: int

    def reserve(self, nbytes: int) -> int:
        """An address from which on so many bytes belong to the caller, and are nothing yet."""

    def make(self, nbytes: int) -> Any:
        """A block of memory, without an address.

        Raises:
            torch.OutOfMemoryError: there is no more.
        """

    def drop(self, block: Any) -> None:
        """Give a block up. Its memory goes when it is mapped nowhere any more."""

    def map(self, block: Any, address: int, nbytes: int) -> None:
        """Put a whole block at an address of a reserved range."""

    def allow(self, address: int, nbytes: int) -> None:
        """From here on a range, all of it mapped, can be read and written."""

    def give_back(self, address: int, nbytes: int, mapped: Collection[tuple[int, int]]) -> None:
        """End a range, of which these addresses, each with its bytes, are mapped. Waits for work on it."""

    def tensor(self, address: int, nbytes: int, owner: object) -> torch.Tensor:
        """A range as uint8 ``[nbytes]``. The tensor keeps ``owner`` alive."""


def pages_of(device: torch.device) -> Pages:
    """Where thin memory of a device comes from.

    Raises:
        RuntimeError: there is none on this device.
    """
    if device.type == "cuda" and torch.version.cuda:
        from graphcap.cudagraph.hardware.thin_cuda import CudaPages

        return CudaPages(device)
    if device.type == "cpu":
        from graphcap.cudagraph.hardware.thin_cpu import CpuPages

        return CpuPages()
    raise RuntimeError(f"memory on {device} cannot be mapped page by page")


class Filler:
    """The memory behind all pages that have none of their own: blocks of 1, 2, 4 ... pages."""

    def __init__(self, pages: Pages, max_pages: int) -> None:
        """At most twice ``max_pages`` are taken, in blocks of at most ``max_pages``."""
        self.pages = pages
        self._max_pages = max(1, max_pages)
        self._blocks: dict[int, Any] = {}
        weakref.finalize(self, _drop_all, pages, self._blocks).atexit = False

    def blocks_for(self, num_pages: int) -> Iterator[tuple[int, Any]]:
        """Blocks, each with its number of pages, that fill so many pages one after the other."""
        size = 1 << (self._max_pages.bit_length() - 1)
        while num_pages:
            while size > num_pages:
                size //= 2
            if size not in self._blocks:
                self._blocks[size] = self.pages.make(size * self.pages.page_bytes)
            yield size, self._blocks[size]
            num_pages -= size


class ThinMemory:
    """One range of addresses with its memory.

    Attributes:
        bytes: uint8 ``[nbytes]``. The range lasts as long as anything lies in its storage.
    """

    def __init__(self, nbytes: int, own: Collection[int], filler: Filler) -> None:
        """Pages ``own`` (counted from the start) get memory of their own, the others the filler's.

        Raises:
            torch.OutOfMemoryError: there is no memory for them.
            RuntimeError: the driver refuses.
        """
        pages = filler.pages
        num_pages = -(-nbytes // pages.page_bytes)
        held = _Range(pages, num_pages * pages.page_bytes)
        shared: dict[int, int] = {}  # per block of the filler, by its pages, the first page that it is at
        at = 0
        for page in [*sorted(own), num_pages]:
            for size, block in filler.blocks_for(page - at):
                held.map(block, at, size)
                shared.setdefault(size, at)
                at += size
            if page < num_pages:
                block = pages.make(pages.page_bytes)
                try:
                    held.map(block, page, 1)
                finally:
                    pages.drop(block)
                at = page + 1
        pages.allow(held.address, held.nbytes)
        self._distinct = [*((at, size) for size, at in shared.items()), *((page, 1) for page in own)]
        self._page_bytes = pages.page_bytes
        self._whole = pages.tensor(held.address, held.nbytes, held)
        self.bytes = self._whole[:nbytes]

    def fill(self, content: torch.Tensor) -> None:
        """Write uint8 ``[max_pages, page_bytes]`` into it: a page holds what is in the row of its number, and begins
        anew where the rows end; one of the filler has its number within its block."""
        for at, size in self._distinct:
            memory = self._whole.narrow(0, at * self._page_bytes, size * self._page_bytes)
            first = at % len(content) if size == 1 else 0
            memory.view(size, -1).copy_(content[first : first + size])


class _Range:
    """Reserved addresses, given back when nobody refers to this any more."""

    def __init__(self, pages: Pages, nbytes: int) -> None:
        self._pages, self.nbytes = pages, nbytes
        self.address = pages.reserve(nbytes)
        self._mapped: list[tuple[int, int]] = []
        weakref.finalize(self, pages.give_back, self.address, nbytes, self._mapped).atexit = False

    def map(self, block: Any, first_page: int, num_pages: int) -> None:
        nbytes = num_pages * self._pages.page_bytes
        address = self.address + first_page * self._pages.page_bytes
        self._pages.map(block, address, nbytes)
        self._mapped.append((address, nbytes))


def _drop_all(pages: Pages, blocks: dict[int, Any]) -> None:
    for block in blocks.values():
        pages.drop(block)
