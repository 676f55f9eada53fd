"""Global state of torch that reaches generated code although no graph shows it: part of every piece's key."""

from __future__ import annotations

import torch


def ambient_state(device_type: str) -> tuple[str, ...]:
    """The switches that are on now: autocast, determinism, default dtype, matmul precision, grad mode."""
    state = [
        f"default_dtype={torch.get_default_dtype()}",
        f"deterministic={torch.are_deterministic_algorithms_enabled()}",
        f"float32_matmul_precision={torch.get_float32_matmul_precision()}",
        f"cudnn_tf32={torch.backends.cudnn.allow_tf32}",
        f"grad={torch.is_grad_enabled()}",
        f"threads={torch.get_num_threads() if device_type == 'cpu' else 0}",  # Inductor bakes the count into C++ loops
    ]
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            state.append(f"autocast_{device}={torch.get_autocast_dtype(device)}")
    return tuple(state)


def device_identity(device: torch.device) -> str:
    """What generated code depends on: the architecture, and the index, which Inductor writes into its wrapper."""
    if device.type == "cuda" and torch.version.hip is None:
        properties = torch.cuda.get_device_properties(device)
        return f"{device} {properties.major}.{properties.minor} {properties.multi_processor_count} multiprocessors"
    if device.type == "cuda":
        return f"{device} rocm {torch.cuda.get_device_properties(device).gcnArchName}"
    if device.type == "cpu":
        return f"cpu {torch.backends.cpu.get_cpu_capability()}"
    return device.type
