"""Which device a region gets, and the reason when it gets none."""

from __future__ import annotations

import torch

from graphcap.cudagraph import device_for


def test_cpu_runs_without_graphs_unless_simulated():
    device, reason = device_for({torch.device("cpu")}, simulate=False)
    assert device is None
    assert "simulate=True" in reason
    device, reason = device_for({torch.device("cpu")}, simulate=True)
    assert (device.name, reason) == ("simulated", "")
    assert device_for(set(), simulate=True)[0] is device


def test_two_cuda_devices_and_other_kinds_are_refused():
    two = {torch.device("cuda", 0), torch.device("cuda", 1)}
    assert device_for(two, simulate=False) == (None, "the region uses CUDA devices 0, 1; a graph runs on one")
    device, reason = device_for({torch.device("meta")}, simulate=True)
    assert device is None
    assert "meta" in reason
