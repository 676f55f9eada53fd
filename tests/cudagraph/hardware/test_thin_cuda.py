"""Pages of the GPU, with a driver made up: what it is asked, in which order, and what an error of it becomes."""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any

import pytest
import torch

from graphcap.cudagraph.hardware import thin_cuda
from graphcap.cudagraph.hardware.thin import Filler, ThinMemory
from graphcap.cudagraph.hardware.thin_cuda import CudaPages, _Access, _Properties

PAGE = 2**21


class Driver:
    """Gives out addresses and handles; every call is written down."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.fails: dict[str, list[int]] = {}
        self._next = 100

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append((name, *arguments))
            failures = self.fails.get(name, [])
            if failures:
                return failures.pop(0)
            if name == "cuMemGetAllocationGranularity":
                arguments[0]._obj.value = PAGE
            elif name in ("cuMemAddressReserve", "cuMemCreate"):
                self._next += 1
                arguments[0]._obj.value = self._next if name == "cuMemCreate" else 10 * PAGE
            return 0

        return call

    def names(self) -> list[str]:
        return [name for name, *_ in self.calls]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setattr(thin_cuda, "_driver", lambda: made)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: made.calls.append((name,)))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return made


@pytest.fixture
def pages(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> CudaPages:
    found = CudaPages(torch.device("cuda", 1))

    def tensor(self: CudaPages, address: int, nbytes: int, owner: object) -> torch.Tensor:
        memory = torch.zeros(1, dtype=torch.uint8)  # there is none behind these addresses
        memory.owner = owner
        return memory

    monkeypatch.setattr(CudaPages, "tensor", tensor)
    driver.calls.clear()
    return found


def test_structures_are_laid_out_as_in_cuda_h() -> None:
    assert ctypes.sizeof(_Properties) == 32
    offsets = {name: getattr(_Properties, name).offset for name, _ in _Properties._fields_}
    assert offsets == {
        "type": 0, "handle_types": 4, "location": 8, "windows_data": 16, "compression": 24, "remote_access": 25,
        "usage": 26, "reserved": 28,
    }  # fmt: skip
    assert (ctypes.sizeof(_Access), _Access.flags.offset) == (12, 8)


def test_memory_is_asked_for_on_the_device(pages: CudaPages, driver: Driver) -> None:
    pages.make(3 * PAGE)
    ((_, _, nbytes, asked, _),) = driver.calls
    assert nbytes == 3 * PAGE
    assert (asked._obj.type, asked._obj.location.type, asked._obj.location.id) == (1, 1, 1)


def test_a_range_is_mapped_whole_then_allowed_and_given_back_part_by_part(pages: CudaPages, driver: Driver) -> None:
    memory = ThinMemory(7 * PAGE - 5, [2], Filler(pages, 2))
    mapped = [tuple(call[1:3]) for call in driver.calls if call[0] == "cuMemMap"]
    start = 10 * PAGE
    assert mapped == [(start + at * PAGE, size * PAGE) for at, size in ((0, 2), (2, 1), (3, 2), (5, 2))]
    assert driver.names()[-1] == "cuMemRelease", "the filler is let go with its last user; what is mapped stays"
    (allowed,) = [call for call in driver.calls if call[0] == "cuMemSetAccess"]
    assert allowed[1:3] == (start, 7 * PAGE)
    assert driver.names().index("cuMemSetAccess") > max(
        i for i, name in enumerate(driver.names()) if name == "cuMemMap"
    )
    created = sum(name == "cuMemCreate" for name in driver.names())
    assert created == sum(name == "cuMemRelease" for name in driver.names()) == 2
    driver.calls.clear()
    del memory
    assert driver.names() == ["synchronize", *["cuMemUnmap"] * 4, "cuMemAddressFree"]


def test_where_memory_is_short_what_torch_has_cached_is_given_back_first(pages: CudaPages, driver: Driver) -> None:
    driver.fails["cuMemCreate"] = [2]
    pages.make(PAGE)
    assert driver.names() == ["cuMemCreate", "empty_cache", "cuMemCreate"]
    driver.fails["cuMemCreate"] = [2, 2]
    with pytest.raises(torch.OutOfMemoryError):
        pages.make(PAGE)


def test_what_was_mapped_before_an_error_is_given_back(pages: CudaPages, driver: Driver) -> None:
    driver.fails["cuMemMap"] = [0, 1]
    with pytest.raises(RuntimeError, match="cuMemMap failed with the driver's error 1"):
        ThinMemory(4 * PAGE, [2], Filler(pages, 2))
    assert driver.names()[-2:] == ["cuMemUnmap", "cuMemAddressFree"]
    created = sum(name == "cuMemCreate" for name in driver.names())
    assert created == sum(name == "cuMemRelease" for name in driver.names())


def test_no_driver_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", nothing)
    thin_cuda._driver.cache_clear()
    with pytest.raises(RuntimeError, match=r"cannot map memory: libcuda\.so\.1"):
        thin_cuda._driver()
