"""Which device serves a region. Devices live as long as the process: plans on one share its pool and its lock."""

from __future__ import annotations

import threading
from collections.abc import Collection

import torch

from graphcap.cudagraph.cuda import CudaDevice
from graphcap.cudagraph.device import GraphDevice
from graphcap.cudagraph.simulated import SimulatedDevice

_devices: dict[str, GraphDevice] = {}
_lock = threading.Lock()


def device_for(devices: Collection[torch.device], simulate: bool) -> tuple[GraphDevice | None, str]:
    """Find the device for a region whose tensors lie on ``devices``.

    CPU tensors beside those of one CUDA device are no obstacle: steps that read them run live.

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
        return _shared(f"cuda:{next(iter(cuda))}"), ""
    if simulate:
        return _shared("simulated"), ""
    return None, "the region runs on the CPU; simulate=True would run the graph runtime on the simulated device"


def _shared(name: str) -> GraphDevice:
    with _lock:
        if name not in _devices:
            _devices[name] = SimulatedDevice() if name == "simulated" else CudaDevice(int(name.removeprefix("cuda:")))
        return _devices[name]
