"""Thin memory: every address can be used, few of them have memory of their own, and all of it goes again."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphcap.cudagraph.hardware.thin import Filler, ThinMemory, pages_of

DEVICES = [torch.device("cpu"), pytest.param(torch.device("cuda", 0), marks=pytest.mark.gpu)]


def thin(device: torch.device, num_pages: int, own: list[int], max_pages: int = 4, odd: int = 0) -> ThinMemory:
    pages = pages_of(device)
    memory = ThinMemory(num_pages * pages.page_bytes - odd, own, Filler(pages, max_pages))
    memory.fill(torch.zeros(max_pages, pages.page_bytes, dtype=torch.uint8, device=device))
    return memory


def pages_with(memory: ThinMemory, page_bytes: int, value: int) -> list[int]:
    found = (memory.bytes == value).nonzero().flatten() // page_bytes
    return sorted(set(found.tolist()))


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_a_page_of_its_own_is_seen_in_one_place_and_a_shared_one_in_several(device: torch.device) -> None:
    size = pages_of(device).page_bytes
    memory = thin(device, 40, own=[0, 17, 39], odd=100)
    assert memory.bytes.shape == (40 * size - 100,)
    for page, value in ((0, 1), (17, 2), (39, 3)):
        memory.bytes[page * size + 5] = value
        assert pages_with(memory, size, value) == [page]
    memory.bytes[20 * size] = 9
    shared = pages_with(memory, size, 9)
    assert len(shared) > 1
    assert not {0, 17, 39} & set(shared)
    assert int(memory.bytes[shared[-1] * size]) == 9


@given(st.integers(1, 70), st.sets(st.integers(0, 69)), st.integers(1, 9))
@settings(max_examples=30)
def test_what_is_mapped(num_pages: int, own: set[int], max_pages: int) -> None:
    """Every page exists, and what is taken is its own pages and less than two of the largest blocks."""
    own = {page for page in own if page < num_pages}
    device = torch.device("cpu")
    before = files()
    memory = thin(device, num_pages, sorted(own), max_pages)
    taken = {inode: size for inode, size in files().items() if inode not in before}
    assert sum(taken.values()) <= (len(own) + 2 * max_pages - 1) * pages_of(device).page_bytes
    memory.bytes.fill_(7)
    assert bool((memory.bytes == 7).all())


def files() -> dict[str, int]:
    """The memory behind everything that is mapped now: the bytes of each nameless file, by its number."""
    found: dict[str, int] = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, _, _, _, inode, *name = line.split()
        if name and "memfd:graphcap" in name[0]:
            start, end = (int(each, 16) for each in addresses.split("-"))
            found[inode] = max(found.get(inode, 0), end - start)
    return found


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_a_page_is_filled_with_the_row_of_its_number(device: torch.device) -> None:
    size = pages_of(device).page_bytes
    memory = thin(device, 30, own=[6, 9])
    rows = torch.arange(1, 5, dtype=torch.uint8, device=device)
    memory.bytes.fill_(99)
    memory.fill(rows[:, None].expand(4, size))
    by_page = memory.bytes.view(30, size)
    assert bool((by_page == by_page[:, :1]).all())
    assert (int(by_page[6, 0]), int(by_page[9, 0])) == (3, 2)
    assert set(by_page[:, 0].tolist()) == {1, 2, 3, 4}


def test_memory_lasts_as_long_as_a_tensor_in_it_and_no_longer() -> None:
    open_files = num_open_files()
    memory = thin(torch.device("cpu"), 20, own=[3])
    assert num_open_files() == open_files
    part = memory.bytes[5:10]
    del memory
    gc.collect()
    part += 1
    assert part.tolist() == [1] * 5
    assert files()
    del part
    gc.collect()
    assert not files()


def num_open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.gpu
def test_memory_of_the_gpu_comes_back() -> None:
    device = torch.device("cuda", 0)
    thin(device, 4, own=[1])
    torch.cuda.synchronize()
    free = torch.cuda.mem_get_info()[0]
    size = pages_of(device).page_bytes
    memory = thin(device, 2000, own=[*range(64)])
    taken = free - torch.cuda.mem_get_info()[0]
    assert 64 * size <= taken <= 64 * size + 32 * size
    memory.bytes.view(torch.float32).add_(1)
    assert bool((memory.bytes.view(torch.float32)[: 64 * size // 4] == 1).all())
    del memory
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.mem_get_info()[0] >= free - 2 * size


def test_a_device_without_pages_says_so() -> None:
    with pytest.raises(RuntimeError, match="meta cannot be mapped"):
        pages_of(torch.device("meta"))
