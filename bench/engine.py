"""Tokens per second of an engine, and the time of its steps, by what runs the model.

The engine of ``examples/engine.py`` (continuous batching, paged KV cache, chunked prefill) serves the same traffic
through each variant of ``bench/engine_runners.py``; only the forward differs. Two kinds of traffic:

- *decode*: N requests with prompts of 32 tokens; timed are the steps in which all of them decode;
- *mixed*: prompts of 16 to 128 tokens that arrive while others decode, 16 to 96 new tokens each; all steps are timed.

A step is timed with all that an engine does in it: scheduling, building the batch, the forward, the greedy choice of
the next tokens, which waits for the device. tokens/s counts generated tokens. Every round serves the traffic from
the start with empty caches; the rounds of the variants are interleaved.

Before timing, each variant serves a short mixed traffic in which the next tokens are given, so that all variants see
the same batches; its error is the norm of the difference of all rows that choose a token to those of the same model in
fp32, relative to the fp32 norm. ``wrong rows`` counts rows whose own error is above 0.5, which no rounding explains.

    PYTHONPATH=. python -m bench.engine --models 0.6b
    PYTHONPATH=. python -m bench.engine --tiny         # CPU: tries the bench; simulated device, meaningless times
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import graphcap
from bench import engine_runners, graphcaps, harness, models
from bench.engine_runners import HAND_MADE, LIMITS, VARIANTS, Limits, Runner, Setup
from bench.harness import say
from bench.record import Record
from examples.engine import Decoder, Engine

#: (prompt, new tokens) by the step in which the request arrives
Traffic = list[tuple[int, list[int], int]]

#: a row further from fp32 than this is wrong, not rounded; a row of another request is at about 1.4
WRONG = 0.5


def decode_traffic(limits: Limits, num_reqs: int, num_steps: int) -> Traffic:
    """num_reqs requests at once, long enough for num_steps steps after the last prompt."""
    prompt, longest = min(32, limits.sizes.max_len // 4), limits.sizes.max_len
    prefill = -(-prompt * num_reqs // max(1, limits.max_num_tokens - num_reqs))
    new = min(longest - prompt, num_steps + prefill + 2)
    choose = random.Random(0)
    return [(0, [choose.randrange(limits.sizes.vocab) for _ in range(prompt)], new) for _ in range(num_reqs)]


def mixed_traffic(limits: Limits, num_reqs: int) -> Traffic:
    """Requests of all lengths, one or two arriving per step."""
    choose, scale = random.Random(1), limits.sizes.max_len / 256
    traffic, at = [], 0
    for _ in range(num_reqs):
        prompt = max(1, int(choose.randint(16, 128) * scale))
        new = max(1, int(choose.randint(16, 96) * scale))
        traffic.append((at, [choose.randrange(limits.sizes.vocab) for _ in range(prompt)], new))
        at += choose.randint(0, 1)
    return traffic


@dataclass
class Served:
    """One run of a traffic: seconds and generated tokens of each timed step."""

    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


def serve(engine: Engine, traffic: Traffic, decode_only: bool = False, max_steps: int | None = None) -> Served:
    """Serve it to the end, or until max_steps were timed.

    With ``decode_only`` steps are timed from the first one on in which every request decodes.
    """
    served, arriving, step = Served(), deque(traffic), 0
    while arriving or engine.waiting or engine.running:
        while arriving and arriving[0][0] <= step:
            engine.add(*arriving.popleft()[1:])
        step += 1
        everybody = not arriving and not engine.waiting
        timed = not decode_only or (everybody and all(request.num_left == 1 for request in engine.running))
        waiting = [*engine.running, *engine.waiting]
        before = sum(len(request.tokens) for request in waiting)
        start = time.perf_counter()
        engine.step()
        if timed:
            served.seconds.append(time.perf_counter() - start)
            served.tokens.append(sum(len(request.tokens) for request in waiting) - before)
        if max_steps is not None and len(served.seconds) >= max_steps:
            break
    return served


def forced_rows(engine: Engine, traffic: Traffic) -> Tensor:
    """Serve with given next tokens; the rows that would choose them, [tokens, hidden] fp32."""
    rows: list[Tensor] = []
    choose, vocab = random.Random(2), engine.model.sizes.vocab

    def sample(hidden: Tensor) -> list[int]:
        rows.append(hidden.float())
        return [choose.randrange(vocab) for _ in range(len(hidden))]

    engine.sample = sample  # type: ignore[method-assign]
    serve(engine, traffic)
    return torch.cat(rows)


def errors(rows: Tensor, reference: Tensor) -> dict[str, float | int]:
    """The relative error of all rows together, and how many are wrong."""
    each = (rows - reference).norm(dim=1) / reference.norm(dim=1)
    wrong = int((~(each <= WRONG)).sum())
    return {"relative_error": harness.relative_error(rows, reference), "wrong_rows": wrong, "checked_rows": len(rows)}


@dataclass
class Entry:
    """A variant that has been built and checked."""

    runner: Runner
    row: dict[str, Any]
    runs: dict[str, list[Served]] = field(default_factory=dict)


def build_all(setup: Setup, names: list[str], traffic: Traffic, record: Record) -> dict[str, Entry]:
    """Every variant that builds here and serves the checked traffic; the others become rows that say why not."""
    wide = models.float_copy(setup.model)
    reference = forced_rows(setup.engine(engine_runners.plain(wide), wide), traffic)
    del wide
    device = setup.model.rotary.device
    entries: dict[str, Entry] = {}
    for name in names:
        harness.collect_garbage(device)
        before, start = harness.used_memory_mib(device), time.perf_counter()
        row: dict[str, Any] = {"variant": name}
        try:
            runner = VARIANTS[name](setup)
            row |= errors(forced_rows(setup.engine(runner), traffic), reference)
            row["build_s"] = time.perf_counter() - start
            after = harness.used_memory_mib(device)
            row["memory_mib"] = None if before is None or after is None else after - before
            entries[name] = Entry(runner, row)
            say(f"  built {name}: {row['build_s']:.1f} s, error {row['relative_error']:.1e}, {row['wrong_rows']} wrong")
        except Exception as error:
            status = harness.failure(error)
            record.put({**row, "model": _name_of(setup), "traffic": "all", "status": status})
            say(f"  {name}: {status}")
    return entries


def _name_of(setup: Setup) -> str:
    return next(name for name, limits in LIMITS.items() if limits is setup.limits)


def summary(runs: list[Served]) -> dict[str, float]:
    """Tokens per second as the median over rounds; P50 and P99 of all steps of all rounds, in milliseconds."""
    speeds = sorted(sum(run.tokens) / sum(run.seconds) for run in runs)
    steps = sorted(second * 1e3 for run in runs for second in run.seconds)
    return {
        "tokens_per_s": speeds[len(speeds) // 2],
        "step_median_ms": steps[len(steps) // 2],
        "step_p99_ms": steps[min(len(steps) - 1, int(0.99 * len(steps)))],
        "steps": len(runs[0].seconds),
        "rounds": len(runs),
    }


def modes_of(runner: Runner) -> dict[str, dict[str, int]]:
    """Of graphcap's variants: the replays so far by mode, and the calls without a graph."""
    engine = getattr(runner, "__self__", None)
    if not isinstance(engine, Engine):
        return {}
    modes: Counter[str] = Counter()
    for region in graphcap.explain(engine.model).regions:
        modes["live"] += sum(region.live_calls.values())
        for plan in region.plans:
            modes[plan.mode] += plan.replays
    return {"modes": dict(modes)}


def put_rows(setup: Setup, entries: dict[str, Entry], record: Record) -> None:
    """Write what the rounds so far give, with the ratio to the hand-made runner under the same traffic."""
    for name, entry in entries.items():
        for traffic, runs in entry.runs.items():
            figures = summary(runs)
            floor = entries.get(HAND_MADE)
            speed = summary(floor.runs[traffic])["tokens_per_s"] if floor and floor.runs.get(traffic) else None
            ratio = figures["tokens_per_s"] / speed if speed else None
            key = {"model": _name_of(setup), "traffic": traffic, "variant": name}
            row = {**entry.row, **key, "status": "ok", **figures, "x_hand_made": ratio}
            record.put({**row, **modes_of(entry.runner)})


def time_rounds(setup: Setup, entries: dict[str, Entry], record: Record, arguments: argparse.Namespace) -> None:
    """Interleaved rounds; a variant that raises leaves them with a row that says so."""
    limits = setup.limits
    traffics = {
        f"decode, {num} requests": (decode_traffic(limits, num, arguments.steps), True)
        for num in (int(word) for word in harness.words(arguments.batch))
        if num <= limits.max_num_reqs
    }
    traffics[f"mixed, {arguments.requests} requests"] = (mixed_traffic(limits, arguments.requests), False)
    for index in range(arguments.rounds + 1):  # the first one warms up
        for label, (traffic, decode_only) in traffics.items():
            for name, entry in list(entries.items()):
                limit = arguments.steps if decode_only or index == 0 else None
                try:
                    served = serve(setup.engine(entry.runner), traffic, decode_only, limit)
                except Exception as error:
                    key = {"model": _name_of(setup), "traffic": label, "variant": name}
                    record.put({**entry.row, **key, "status": harness.failure(error)})
                    del entries[name]
                    continue
                if index:
                    entry.runs.setdefault(label, []).append(served)
        put_rows(setup, entries, record)
        say(f"  round {index}/{arguments.rounds}" if index else "  warmed up")


def parse_arguments() -> argparse.Namespace:
    parser = harness.common_arguments(__doc__ or "", ("0.6b",), "engine.json")
    parser.add_argument("--batch", default="8,64", help="requests of the decode traffic; default %(default)s")
    parser.add_argument("--requests", type=int, default=128, help="requests of the mixed traffic; default %(default)s")
    parser.add_argument("--steps", type=int, default=100, help="timed steps of pure decode; default %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default %(default)s")
    parser.add_argument("--explain", action="store_true", help="print graphcap's report of each of its variants")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    device = harness.default_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    record = Record(arguments.json, "engine", device, key=("model", "traffic", "variant"))
    names = [name for name in VARIANTS if harness.selected(name, arguments.only)]
    with torch._dynamo.config.patch(recompile_limit=64), torch.inference_mode():
        for name in ["tiny"] if arguments.tiny else harness.words(arguments.models):
            limits = LIMITS[name]
            with torch.inference_mode(mode=False), torch.no_grad():
                torch.manual_seed(0)
                with device:
                    model = Decoder(limits.sizes, limits.num_blocks)
                model = model.to(dtype).eval().requires_grad_(False)
            say(f"{name}: {', '.join(names)}")
            setup = Setup(model, limits, json.loads(arguments.graphcap_options))
            entries = build_all(setup, names, mixed_traffic(limits, 12), record)
            time_rounds(setup, entries, record, arguments)
            for variant, entry in entries.items():
                if modes := modes_of(entry.runner):
                    say(f"  {variant}: {modes['modes']}")
            if arguments.explain:
                say(graphcaps.report_text(None))


if __name__ == "__main__":
    main()
