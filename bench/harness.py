"""Timing of one step, and running many variants without one failure ending the bench.

Two numbers per variant, because a CUDA step has two costs:

- *step*: wall time per step with the steps issued back to back and one synchronisation at the end. The mean comes from
  the wall clock; median and P99 from CUDA events recorded after every step (from the wall clock on a CPU).
- *host*: time until the call returns, measured per call. The device is drained every few calls, so that the launch
  queue never fills and the host is never made to wait for the device.

Variants of one group are timed in interleaved rounds in one process, so that clock and temperature drift hits all of
them alike. A row reports the median over rounds of the mean, and median and P99 of all samples.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

Call = Callable[[], object]

#: calls between two synchronisations of the host measurement: keeps the launch queue (1024 entries) from filling
CALLS_PER_DRAIN = 4


def say(text: str) -> None:
    """Print one line of progress, flushed: the bench may run behind a pipe that is cut at a time limit."""
    print(text, flush=True)


class Skipped(Exception):
    """A variant that cannot run here, with the reason: it becomes a row, not an error."""


def failure(error: Exception) -> str:
    """The status of a row whose variant raised."""
    if isinstance(error, Skipped):
        return f"skipped: {error}"
    traceback.print_exc(file=sys.stdout)
    lines = str(error).strip().splitlines()
    return f"failed: {type(error).__name__}: {lines[0][:200] if lines else ''}"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def side_stream() -> torch.cuda.Stream:
    """A stream to warm up and capture on, ordered after the work that has been issued so far."""
    stream: torch.cuda.Stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    return stream


def timing_events(num_events: int) -> list[torch.cuda.Event]:
    return [torch.cuda.Event(enable_timing=True) for _ in range(num_events)]


def collect_garbage(device: torch.device) -> None:
    """Give back what dead variants held, compiled code included."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def used_memory_mib(device: torch.device) -> float | None:
    """Device memory in use by the whole machine, after returning cached blocks; None on a CPU."""
    if device.type != "cuda":
        return None
    collect_garbage(device)
    free, total = torch.cuda.mem_get_info(device)
    return (total - free) / 2**20


@dataclass
class Samples:
    """The measurements of one quantity over several rounds, in microseconds."""

    round_means: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def summary(self, name: str) -> dict[str, float]:
        """``{name}_mean_us``, ``{name}_median_us`` and ``{name}_p99_us``."""
        ordered = sorted(self.values)
        return {
            f"{name}_mean_us": statistics.median(self.round_means),
            f"{name}_median_us": statistics.median(ordered),
            f"{name}_p99_us": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
        }


def time_steps(call: Call, num_steps: int, device: torch.device, into: Samples) -> None:
    """Run num_steps back to back and add one round to ``into``; unit microseconds."""
    synchronize(device)
    if device.type == "cuda":
        events = timing_events(num_steps)
        start = time.perf_counter()
        for event in events:
            call()
            event.record()
        synchronize(device)
        elapsed = time.perf_counter() - start
        # The first interval would contain the way from an idle device; intervals between steps do not.
        into.values.extend(a.elapsed_time(b) * 1e3 for a, b in itertools.pairwise(events))
    else:
        start = last = time.perf_counter()
        for _ in range(num_steps):
            call()
            now = time.perf_counter()
            into.values.append((now - last) * 1e6)
            last = now
        elapsed = last - start
    into.round_means.append(elapsed / num_steps * 1e6)


def time_host(call: Call, num_calls: int, device: torch.device, into: Samples) -> None:
    """Time until each of num_calls returns, and add one round to ``into``; unit microseconds."""
    values: list[float] = []
    for index in range(num_calls):
        if index % CALLS_PER_DRAIN == 0:
            synchronize(device)
        start = time.perf_counter()
        call()
        values.append((time.perf_counter() - start) * 1e6)
    synchronize(device)
    into.values.extend(values)
    into.round_means.append(statistics.fmean(values))


def count_launches(call: Call, device: torch.device) -> dict[str, int]:
    """Kernel and graph launches of one step, seen by the profiler.

    Run it after all timing of a process: the profiler stays attached to the driver.
    """
    if device.type != "cuda":
        return {}
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    for _ in range(2):  # the first profile of a process misses what was launched while it was set up
        with torch.profiler.profile(activities=activities) as profile:
            call()
            synchronize(device)
    counts = {"graph_launches": 0, "kernel_launches": 0}
    for event in profile.key_averages():
        if event.key.startswith("cudaGraphLaunch"):
            counts["graph_launches"] += event.count
        elif event.key.startswith(("cudaLaunchKernel", "cuLaunchKernel")):
            counts["kernel_launches"] += event.count
    return counts


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over the norm of the fp32 reference."""
    return float((value.float() - reference).norm() / reference.norm())


def common_arguments(description: str, models: Sequence[str], result: str) -> argparse.ArgumentParser:
    """The argument parser that the benches share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(models), help="comma separated; default %(default)s")
    parser.add_argument("--only", default="", help="comma separated parts of variant names; default all variants")
    parser.add_argument("--json", type=Path, default=Path("bench/results") / result, help="default %(default)s")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the bench itself on a CPU")
    parser.add_argument("--graphcap-options", default="{}", help="JSON object of further graphcap.Config fields")
    return parser


def words(text: str) -> list[str]:
    """The parts of a comma separated argument."""
    return [part.strip() for part in text.split(",") if part.strip()]


def selected(name: str, only: str) -> bool:
    """Whether ``--only`` asks for the variant; every variant when it is empty."""
    return not only or any(part.lower() in name.lower() for part in words(only))


def default_device() -> torch.device:
    """The current CUDA device, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
