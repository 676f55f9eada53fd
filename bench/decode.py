"""How long is one decode step, on the device and on the host?

The lab decoder of ``bench/models.py`` (bf16, one token per sequence, KV context 256, opaque mutating attention op)
runs one step per call under ``torch.inference_mode()``, as eager, torch.compile, hand-made CUDA graphs and graphcap.
All variants of one model and batch size live in one process over the same weights and are timed in interleaved rounds.
Inputs alternate between two sets at different addresses, so that no variant gains from inputs that never move.

Before timing, each variant runs on inputs that it has not seen, with the cache slots it must write filled with NaN; its
error is the norm of the difference to the same model in fp32, relative to the fp32 norm. ``x floor`` is the step time
over that of the hand-made graphs of the same kind (PIECEWISE for the rows named so, FULL for all others).

    PYTHONPATH=. python -m bench.decode --models 0.6b --batch 1,64
    PYTHONPATH=. python -m bench.decode --tiny          # CPU: tries the bench; simulated device, meaningless times
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench import graphcaps, harness, models
from bench.decode_variants import HAND_FULL, HAND_PIECEWISE, Forward, Group
from bench.harness import Samples, say
from bench.record import Record

#: calls before timing: more than any variant needs to compile, warm up and capture
WARM_UP_CALLS = 6
CHECK_SEED = 99


@dataclass
class Entry:
    """One variant that has been built: its callable, its own inputs, its samples and its row."""

    forward: Forward
    row: dict[str, Any]
    call: harness.Call
    step: Samples = field(default_factory=Samples)
    host: Samples = field(default_factory=Samples)


def alternating(forward: Forward, first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> harness.Call:
    """A call of one step whose inputs move between two addresses; drops the outputs."""
    sets = itertools.cycle((first, second))

    def call() -> None:
        forward(*next(sets))

    return call


def fp32_reference(group: Group) -> Tensor:
    """The output for the check's inputs of the same model with fp32 weights, caches and arithmetic."""
    models.fill_caches(group.model)
    wide = models.float_copy(group.model)
    output: Tensor = wide(*group.inputs(CHECK_SEED))
    del wide
    harness.collect_garbage(group.device)
    return output


def check(group: Group, forward: Forward, reference: Tensor) -> float:
    """The relative error for inputs that no warm-up used."""
    inputs = group.inputs(CHECK_SEED)
    models.fill_caches(group.model)
    models.poison_slots(group.model, inputs[2])
    return harness.relative_error(forward(*inputs), reference)


def build(name: str, group: Group, reference: Tensor, row: dict[str, Any]) -> Entry:
    """Build, warm up and check one variant, filling its row with what is known before timing."""
    before = harness.used_memory_mib(group.device)
    start = time.perf_counter()
    forward = group.variants[name](group)
    if name == "torch.compile default":
        group.compiled = forward
    call = alternating(forward, group.inputs(seed=1), group.inputs(seed=2))
    for _ in range(WARM_UP_CALLS):
        call()
    harness.synchronize(group.device)
    row["build_s"] = time.perf_counter() - start
    row["relative_error"] = check(group, forward, reference)
    for _ in range(WARM_UP_CALLS):  # the check may have been a new sight for a variant's bookkeeping
        call()
    if name.startswith("graphcap FULL"):
        graphcaps.require_whole_graphs(forward)
    after = harness.used_memory_mib(group.device)
    row["memory_mib"] = None if before is None or after is None else after - before
    return Entry(forward, row, call)


def build_all(group: Group, names: list[str], record: Record) -> dict[str, Entry]:
    """Every variant that builds here; the others become rows that say why not."""
    shared_key = {"model": group.model.config.name, "batch": group.batch}
    for name in names:  # fixes the order of the rows, and says so if the process is cut off
        record.put({**shared_key, "variant": name, "status": "not finished"})
    reference = fp32_reference(group)
    entries: dict[str, Entry] = {}
    for name in names:
        row: dict[str, Any] = {**shared_key, "variant": name}
        try:
            entries[name] = build(name, group, reference, row)
            say(f"  built {name}: {row['build_s']:.1f} s, relative error {row['relative_error']:.2e}")
        except Exception as error:
            status = harness.failure(error)
            record.put({**row, "status": status})
            say(f"  {name}: {status}")
        harness.collect_garbage(group.device)
    return entries


def put_rows(entries: dict[str, Entry], record: Record) -> None:
    """Write what the rounds so far give, with the ratio to the floor of the same kind."""
    summaries = {name: entry.step.summary("step") for name, entry in entries.items() if entry.step.values}
    for name, summary in summaries.items():
        entry = entries[name]
        floor = summaries.get(HAND_PIECEWISE if "PIECEWISE" in name else HAND_FULL)
        mean = summary["step_mean_us"]
        record.put(
            {
                **entry.row,
                "status": "ok",
                **summary,
                **entry.host.summary("host"),
                "tokens_per_s": entry.row["batch"] / mean * 1e6,
                "x_floor": mean / floor["step_mean_us"] if floor else None,
                "rounds": len(entry.step.round_means),
            }
        )


def time_rounds(group: Group, entries: dict[str, Entry], record: Record, rounds: int, steps: int) -> None:
    """Interleaved rounds; a variant that raises while timed leaves the rounds with a row that says so."""
    for index in range(rounds):
        for name, entry in list(entries.items()):
            try:
                for _ in range(3):
                    entry.call()
                harness.time_steps(entry.call, steps, group.device, into=entry.step)
                harness.time_host(entry.call, steps, group.device, into=entry.host)
            except Exception as error:
                record.put({**entry.row, "status": harness.failure(error)})
                del entries[name]
        put_rows(entries, record)
        say(f"  round {index + 1}/{rounds}")
    for name, entry in entries.items():
        step, host = entry.step.summary("step"), entry.host.summary("host")
        say(f"  {name:55s} step {step['step_mean_us']:9.1f} us   host {host['host_mean_us']:9.1f} us")


def run_group(group: Group, record: Record, arguments: argparse.Namespace) -> None:
    """All variants of one model and batch size."""
    names = [name for name in group.variants if harness.selected(name, arguments.only)]
    entries = build_all(group, names, record)
    time_rounds(group, entries, record, arguments.rounds, arguments.steps)
    for name, entry in entries.items():
        if arguments.explain and name.startswith("graphcap"):
            say(f"{name}:\n{graphcaps.report_text(entry.forward)}")
        if arguments.count_launches:
            launches = harness.count_launches(entry.call, group.device)
            entry.row |= launches
            say(f"  {name}: {launches}")
    put_rows(entries, record)


def parse_arguments() -> argparse.Namespace:
    parser = harness.common_arguments(__doc__ or "", ("0.6b", "8b"), "decode.json")
    parser.add_argument("--batch", default="1,64", help="comma separated; default %(default)s")
    parser.add_argument("--steps", type=int, default=50, help="steps per round; default %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default %(default)s")
    parser.add_argument("--explain", action="store_true", help="print graphcap's report of each of its variants")
    parser.add_argument(
        "--count-launches",
        action="store_true",
        help="profile one step of each variant after timing it (a run for itself: the profiler stays attached)",
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    device = harness.default_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    record = Record(arguments.json, "decode", device, key=("model", "batch", "variant"))
    batches = [int(batch) for batch in harness.words(arguments.batch)]
    # Variants share the code object of Decoder.forward, and Dynamo counts their compilations together.
    with torch._dynamo.config.patch(recompile_limit=64), torch.inference_mode():
        for name in ["tiny"] if arguments.tiny else harness.words(arguments.models):
            with torch.inference_mode(mode=False), torch.no_grad():
                model = models.build_decoder(models.CONFIGS[name], device, dtype, max(batches))
            for batch in batches:
                say(f"{name}, batch {batch}")
                options = json.loads(arguments.graphcap_options)
                run_group(Group(model, batch, device, options), record, arguments)
                torch._dynamo.reset()
                harness.collect_garbage(device)
            del model
            harness.collect_garbage(device)


if __name__ == "__main__":
    main()
