"""How much device memory graphs take, and how much they may: for reports, and for who shares the device with them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphcap.cudagraph.hardware.cuda import default_limit
from graphcap.cudagraph.hardware.devices import all_devices


@dataclass(frozen=True, slots=True)
class GraphMemory:
    """The account of one device.

    Attributes:
        device: ``"cuda:0"``.
        num_plans: captured shapes that can be replayed now.
        exclusive_bytes: what the plans hold each for itself: the executable graphs.
        shared_bytes: pools, library workspaces and static buffers.
        ceiling_bytes: the largest ``max_graph_bytes`` that a model has asked for, the default where none has yet;
            ``None`` is no limit. Only a capture in progress may go beyond it, by the plan that it then gives up. An
            engine takes it off before it sizes its own memory.
    """

    device: str
    num_plans: int
    exclusive_bytes: int
    shared_bytes: int
    ceiling_bytes: int | None

    @property
    def used_bytes(self) -> int:
        """Exclusive and shared together."""
        return self.exclusive_bytes + self.shared_bytes


def memory() -> dict[str, GraphMemory]:
    """The account of every CUDA device of this process, by name, and of the simulated device where it was used.

    Example::

        graphs = graphcap.memory()["cuda:0"]
        for_kv_cache = free_bytes - (graphs.ceiling_bytes - graphs.used_bytes)
    """
    names = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    found = {name: GraphMemory(name, 0, 0, 0, default_limit(index)) for index, name in enumerate(names)}
    for account in {device.account for device in all_devices()}:
        before = found.get(account.name, GraphMemory(account.name, 0, 0, 0, None))
        found[account.name] = GraphMemory(
            account.name,
            before.num_plans + len(account.holdings()),
            before.exclusive_bytes + account.exclusive_bytes(),
            before.shared_bytes + account.shared_bytes(),
            before.ceiling_bytes if account.ceiling is None else account.ceiling,
        )
    return found
