"""Two processes that run scenarios side by side: over gloo on simulated devices, or over NCCL on two GPUs.

A scenario is a function of a :class:`Rank`; what it returns is what a test looks at. It has groups of its own, so that
one that loses step harms no other. Every wait ends: a scenario that hangs is an error of that scenario.
"""

from __future__ import annotations

import datetime
import faulthandler
import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import graphcap

WORLD = 2
PATIENCE = 60.0  #: seconds until a rank gives up waiting for another one
STUCK = 45.0  #: seconds until a scenario shows where it is
LIMIT = 240.0  #: seconds for all scenarios together


@dataclass
class Rank:
    """What one process has in one scenario.

    Attributes:
        rank: 0 or 1.
        device: where its tensors are.
        group: in which decisions are made.
        traffic: in which the model's own collectives run.
        sums: per collective of the model its size, in order.
    """

    rank: int
    device: torch.device
    group: Any
    traffic: Any
    sums: list[tuple[int, ...]] = field(default_factory=list)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the ranks, in fresh memory."""
        total = x.clone()
        self.sums.append(tuple(total.shape))
        dist.all_reduce(total, group=self.traffic)
        return total

    def patient(self, seconds: float) -> Any:
        """A group that waits for so long."""
        return dist.new_group(range(WORLD), timeout=datetime.timedelta(seconds=seconds), backend="gloo")


Scenario = Callable[[Rank], Any]


def run_on_two_ranks(scenarios: Mapping[str, Scenario], folder: Path, backend: str = "gloo") -> dict[str, list[Any]]:
    """Run each scenario on both ranks.

    Args:
        scenarios: by name; functions of a module, so that a new process finds them.
        folder: for files.
        backend: "gloo", or "nccl" for a GPU each.

    Returns:
        Per scenario what rank 0 and rank 1 returned, an exception that it raised as a string; under "exit codes" those
        of the processes.
    """
    context = multiprocessing.get_context("spawn")
    jobs = [(rank, dict(scenarios), folder, backend) for rank in range(WORLD)]
    workers = [context.Process(target=_work, args=job, daemon=True) for job in jobs]
    for worker in workers:
        worker.start()
    end = time.monotonic() + LIMIT
    for worker in workers:
        worker.join(max(0.0, end - time.monotonic()))
        if worker.is_alive():
            worker.kill()
            worker.join()
    files = [folder / f"rank{rank}" for rank in range(WORLD)]
    found = [pickle.loads(file.read_bytes()) if file.exists() else {} for file in files]
    stuck = [f"did not come so far\n{file.with_suffix('.stack').read_text()}" for file in files]
    results = {name: [each.get(name, at) for each, at in zip(found, stuck, strict=True)] for name in scenarios}
    return results | {"exit codes": [worker.exitcode for worker in workers]}


def _work(rank: int, scenarios: Mapping[str, Scenario], folder: Path, backend: str) -> None:
    os.environ["GRAPHCAP_CACHE_DIR"] = str(folder / "cache")
    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=PATIENCE)
    device = torch.device("cpu") if backend == "gloo" else torch.device("cuda", rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=wait)
    results: dict[str, Any] = {}
    stack = (folder / f"rank{rank}.stack").open("w")
    for name, scenario in scenarios.items():
        faulthandler.dump_traceback_later(STUCK, file=stack)
        groups = [dist.new_group(range(WORLD), timeout=wait, backend=backend) for _ in range(2)]
        try:
            results[name] = scenario(Rank(rank, device, *groups))
        except BaseException:
            results[name] = "raised " + traceback.format_exc()
        (folder / f"rank{rank}").write_bytes(pickle.dumps(results))
    faulthandler.cancel_dump_traceback_later()
    graphcap.reset()
    dist.destroy_process_group()
