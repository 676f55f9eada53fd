"""Which device serves a region. Devices live as long as the process: plans on one share its pool and its lock."""

from __future__ import annotations

import threading
from collections.abc import Collection

import torch

from graphcap.cudagraph.hardware.account import Account
from graphcap.cudagraph.hardware.cuda import CudaDevice
from graphcap.cudagraph.hardware.device import GraphDevice
from graphcap.cudagraph.hardware.simulated import SimulatedDevice

_devices: dict[str, GraphDevice] = {}
_lock = threading.Lock()


def device_for(
    devices: Collection[torch.device], simulate: bool, private: bool = False
) -> tuple[GraphDevice | None, str]:
    """Find the device for a region whose tensors lie on ``devices``.

    CPU tensors beside those of one CUDA device are no obstacle: steps that read them run live.

    Args:
        devices: of all tensors of the region.
        simulate: take the simulated device where there is no CUDA device among them.
        private: make an object with a pool, a recording stream and a lock of its own, so that its plans may run at the
            same time as others. The memory goes into the same account.

    Returns:
        The device and an empty string, or ``None`` and the reason why the region runs without graphs.
    """
    kinds = {device.type for device in devices}
    cuda = {device.index or 0 for device in devices if device.type == "cuda"}
    if kinds - {"cpu", "cuda"}:
        return None, f"graphs are made on cuda only, this region uses {', '.join(sorted(kinds))}"
    if len(cuda) > 1:
        return None, f"the region uses CUDA devices {', '.join(map(str, sorted(cuda)))}; a graph runs on one"
    if cuda:
        return _find(f"cuda:{next(iter(cuda))}", private), ""
    if simulate:
        return _find("simulated", private), ""
    return None, "the region runs on the CPU; simulate=True would run the graph runtime on the simulated device"


def set_graph_pool(pool: torch.cuda.MemPool | None, device: torch.device | str | int | None = None) -> None:
    """Let graphs take their memory from a pool of yours: one with an allocator of NCCL, say, or for symmetric memory.

    It concerns captures that begin later, of models with ``pool="shared"``. Plans keep the pool alive.

    Args:
        pool: from now on; ``None`` goes back to a pool of graphcap's own.
        device: a CUDA device; ``None`` is the current one.

    Raises:
        TypeError: ``pool`` is no ``torch.cuda.MemPool``.
        ValueError: ``device`` is no CUDA device.
    """
    if pool is not None and not isinstance(pool, torch.cuda.MemPool):
        raise TypeError(f"set_graph_pool: expected a torch.cuda.MemPool or None, got {type(pool).__name__}")
    wanted = torch.device("cuda", device) if isinstance(device, int) else torch.device(device or "cuda")
    if wanted.type != "cuda":
        raise ValueError(f"set_graph_pool: graphs are made on cuda only, not on {wanted}")
    index = torch.cuda.current_device() if str(wanted) == "cuda" else wanted.index
    found = _find(f"cuda:{index}", private=False)
    assert isinstance(found, CudaDevice)
    found.back_with(pool)


def _find(name: str, private: bool) -> GraphDevice:
    with _lock:
        if name not in _devices:
            _devices[name] = _open(name, None)
        shared = _devices[name]
    return _open(name, shared.account) if private else shared


def _open(name: str, account: Account | None) -> GraphDevice:
    if name == "simulated":
        return SimulatedDevice(account)
    return CudaDevice(int(name.removeprefix("cuda:")), account)
