"""Kernels are compiled by the JIT and launched without it, wherever what it compiled fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from graphcap.passes.kernels import direct_launch
from graphcap.passes.kernels.add_rms_norm import add_rms_norm
from graphcap.passes.kernels.direct_launch import DirectLaunch


@dataclass
class Pointer:
    """As much of a CUDA tensor as a launch asks for."""

    address: int
    device: int = 0

    def data_ptr(self) -> int:
        return self.address

    def get_device(self) -> int:
        return self.device


@dataclass
class Kernel:
    """Stands in for what ``triton.jit`` makes, and notes who launches what."""

    launches: list[tuple[Any, ...]] = field(default_factory=list)
    compiles: bool = True
    takes_streams: bool = True

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*arguments: Any, **options: Any) -> Any:
            self.launches.append(("jit", grid, arguments, options))
            return Compiled(self) if self.compiles else None

        return launch


@dataclass
class Compiled:
    kernel: Kernel

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*arguments: Any, stream: int) -> None:
            if not self.kernel.takes_streams:
                raise TypeError("unexpected keyword argument 'stream'")
            self.kernel.launches.append(("compiled", grid, arguments, stream, current[0]))

        return launch


current = [0]


@pytest.fixture(autouse=True)
def devices(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def device(index: int) -> Iterator[None]:
        before, current[0] = current[0], index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(direct_launch, "current_raw_stream", lambda index: 700 + index)


def how(kernel: Kernel) -> list[str]:
    return [launch[0] for launch in kernel.launches]


def test_the_first_launch_of_a_kind_compiles_and_the_next_ones_do_not() -> None:
    kernel = Kernel()
    launch = DirectLaunch(kernel)
    first, second = Pointer(512), Pointer(1024)
    for num_programs in (3, 4):
        launch("a", num_programs, (first, second), (8, 0.5, True), num_warps=2)  # type: ignore[arg-type]
    assert kernel.launches == [
        ("jit", (3, 1, 1), (first, second, 8, 0.5, True), {"num_warps": 2}),
        ("compiled", (4, 1, 1), (512, 1024, 8, 0.5, True), 700, 0),
    ]
    launch("b", 4, (first, second), (9, 0.5, True), num_warps=2)  # type: ignore[arg-type]
    assert how(kernel) == ["jit", "compiled", "jit"], "another kind is compiled itself"


@pytest.mark.parametrize("odd", [0, 1])
def test_an_address_that_is_not_aligned_is_the_jits(odd: int) -> None:
    kernel = Kernel()
    launch = DirectLaunch(kernel)
    for addresses in ([512, 512], [520 if each == odd else 512 for each in range(2)], [512, 512]):
        launch("a", 1, [Pointer(each) for each in addresses], ())  # type: ignore[misc]
    assert how(kernel) == ["jit", "jit", "compiled"]
    kernel.launches.clear()
    launch = DirectLaunch(kernel)
    for address in (520, 512, 512):
        launch("a", 1, [Pointer(address)], ())  # type: ignore[list-item]
    assert how(kernel) == ["jit", "jit", "compiled"], "what was compiled for the first serves no other"


def test_each_device_has_its_own_kernel() -> None:
    kernel = Kernel()
    launch = DirectLaunch(kernel)
    for device in (0, 1, 1, 0):
        launch("a", 1, [Pointer(512, device)], ())  # type: ignore[list-item]
    assert how(kernel) == ["jit", "jit", "compiled", "compiled"]
    assert [launch[3:] for launch in kernel.launches[2:]] == [(701, 1), (700, 0)], "on its stream, while it is current"
    assert current == [0]


def test_a_triton_that_launches_in_another_way_is_left_to_its_jit() -> None:
    kernel = Kernel(takes_streams=False)
    launch = DirectLaunch(kernel)
    for _ in range(4):
        launch("a", 1, [Pointer(512)], ())  # type: ignore[list-item]
    assert how(kernel) == ["jit"] * 4


def test_an_interpreter_compiles_nothing() -> None:
    kernel = Kernel(compiles=False)
    launch = DirectLaunch(kernel)
    for _ in range(2):
        launch("a", 1, [Pointer(512)], ())  # type: ignore[list-item]
    assert how(kernel) == ["jit"] * 2


def rows(offset: int, dtype: torch.dtype = torch.bfloat16, hidden: int = 64) -> torch.Tensor:
    """Random ``[3, hidden]``, contiguous, so many elements behind an aligned address."""
    tensor = torch.empty(3 * hidden + offset, dtype=dtype, device="cuda")[offset:].view(3, hidden)
    return tensor.copy_(torch.randn(3, hidden))


@pytest.mark.gpu
def test_launches_of_every_kind_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for _ in range(2):
        for dtype in (torch.bfloat16, torch.float32):
            for hidden in (64, 65, 1):
                for offset in (0, 1):
                    for weight_dtype in {dtype, torch.float32}:
                        x, residual = rows(offset, dtype, hidden), rows(0, dtype, hidden)
                        weight = torch.randn(hidden, device="cuda", dtype=weight_dtype)
                        given = x, residual, weight
                        found = add_rms_norm(*given, 1e-6, True)
                        expected = add_rms_norm(*(each.cpu() for each in given), 1e-6, True)
                        near = 2e-2 if dtype is torch.bfloat16 else 1e-4
                        torch.testing.assert_close([e.cpu() for e in found], list(expected), rtol=near, atol=near)


@pytest.mark.gpu
def test_a_launch_goes_to_the_current_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that is captured on a side stream holds it."""
    monkeypatch.undo()
    x, residual, weight = rows(0), rows(0), torch.randn(64, device="cuda", dtype=torch.bfloat16)
    for _ in range(2):
        add_rms_norm(x, residual, weight, 1e-6, False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = add_rms_norm(x, residual, weight, 1e-6, False)
    x.copy_(torch.randn(3, 64))
    graph.replay()
    torch.testing.assert_close(found, add_rms_norm(x, residual, weight, 1e-6, False), rtol=0, atol=0)
