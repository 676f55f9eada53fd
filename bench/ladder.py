"""A ladder of sizes: what its graphs cost, and whether traffic of any size is served rightly from it.

Four parts, over 35 sizes (1, 2, 4, 8..256 by 8) of the lab decoder of ``bench/models.py``. Every variant runs in a
process of its own, so that none finds what another has left: kernels that are loaded, memory that the driver keeps for
graphs that are gone. Their order does not matter.

- *libraries*: seconds that the eager model takes to run each size once, and once more, before anything else in each
  process. The difference is what any program pays for new sizes, with graphs or without: plans of cuDNN's attention,
  choices and kernels of cuBLAS. cuDNN's attention stays on: torch chooses it, and its plans are in this row.
- *capture*: seconds and MiB of device memory of all graphs, captured at one go. Artifacts are warm: a live call has
  compiled everything before. Device memory is cudaMemGetInfo's, after empty_cache on both sides; weights and KV caches
  are there before, workspaces and warm-ups are counted. All PIECEWISE variants call the same attention op, which the
  FULL ones capture; it takes padded batches.
- *traffic*: calls of random sizes 1 to 300, captures forbidden. Sizes between the rungs are padded; a padded row writes
  zeros into one row of the caches that belongs to nobody. Each row is compared with the same model in fp32; a row is
  wrong when the norm of its error is above 0.5 of its own norm (a row of another request is at about 1.4). Calls up to
  256 must all be replays, and memory must not grow between the first tenth of the calls and the end.
- *threads*: 8 threads over 2 models without state (``bench/rowwise.py``), each on a stream of its own, random sizes,
  for 60 s; rows are compared in the same way.

    PYTHONPATH=. python -m bench.ladder
    PYTHONPATH=. python -m bench.ladder --tiny         # CPU: tries the bench; simulated device, meaningless times
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import graphcap
from bench import graphcaps, handmade, harness, models, rowwise
from bench.harness import say
from bench.models import Decoder
from bench.record import Record

SIZES = (1, 2, 4, *range(8, 257, 8))
WRONG = 0.5
DIMS = {name: {0: "num_tokens"} for name in ("input_ids", "positions", "slot_mapping")}
PAD = {"input_ids": 0, "positions": 0, "slot_mapping": -1}

Forward = Callable[..., Tensor]


def attend_padded(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, out: Tensor
) -> None:
    """:func:`bench.models.attend` for padded batches: slot -1 is the last row of the caches, and gets zeros."""
    real = slot_mapping >= 0
    slots = torch.where(real, slot_mapping, k_cache.shape[0] * k_cache.shape[1] - 1)
    k, v = (torch.where(real[:, None, None], each, 0) for each in (k, v))
    models.attend(q, k, v, k_cache, v_cache, slots, out)


_MUTATED = ("k_cache", "v_cache", "out")
torch.library.custom_op("lab::padded_attention", mutates_args=_MUTATED)(attend_padded)
torch.library.custom_op("lab::capturable_padded_attention", mutates_args=_MUTATED)(attend_padded)
OPS = {"PIECEWISE": "padded_attention", "FULL": "capturable_padded_attention"}


@dataclass
class Ladder:
    """What the variants share. Traffic goes up to ``most``, beyond the largest size; there is one sequence more."""

    model: Decoder
    sizes: tuple[int, ...]
    most: int
    options: dict[str, Any]
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.model.rotary.device

    def inputs(self, num_tokens: int, seed: int) -> tuple[Tensor, ...]:
        return models.decode_inputs(self.model.config, self.device, num_tokens, seed)

    def fill_caches(self) -> None:
        """Fill the KV caches with the same rows every time, and the one that belongs to nobody with zeros."""
        models.fill_caches(self.model)
        for cache in models.caches(self.model):
            cache[-1, -1] = 0


@dataclass
class Subject:
    """A variant: its callable once everything is compiled, and what captures all of its sizes."""

    forward: Forward
    capture: Callable[[], object]
    is_ours: bool


def with_attention(model: Decoder, mode: str) -> Decoder:
    """The same weights and caches, with the op that a mode captures or leaves live."""
    model = models.share_tensors(model)
    for layer in model.decoder_layers():
        layer.attention_op = getattr(torch.ops.lab, OPS[mode])
    return model


def ours(mode: str, **further: Any) -> Callable[[Ladder], Subject]:
    """graphcap with declared dims, padded by repeating the last row."""

    def build(ladder: Ladder) -> Subject:
        model = with_attention(ladder.model, mode)
        graphcap.register_op(f"lab::{OPS['FULL']}", capture="always")
        settings = {"cudagraph_mode": mode, "capture_sizes": ladder.sizes, "pad": PAD, "max_padding_ratio": 0.9}
        settings |= {**further, **graphcaps.device_options(ladder.device), **ladder.options}
        graphcap.compile(model, dynamic_arg_dims=DIMS, **settings)

        def make_inputs(key: graphcap.GraphKey) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
            return ladder.inputs(key.num_tokens, seed=0), {}

        return Subject(model, lambda: graphcap.capture(model, make_inputs), is_ours=True)

    return build


def hand_full(ladder: Ladder) -> Subject:
    handmade.require_cuda(ladder.model.rotary)
    compiled = torch.compile(with_attention(ladder.model, "FULL"), dynamic=True)
    graphs: list[Forward] = []

    def capture() -> None:
        pool = torch.cuda.graph_pool_handle()
        graphs.extend(handmade.full_graph(compiled, ladder.inputs(size, 0), pool) for size in reversed(ladder.sizes))

    return Subject(compiled, capture, is_ours=False)


def hand_piecewise(ladder: Ladder) -> Subject:
    handmade.require_cuda(ladder.model.rotary)
    pieces = handmade.CompiledPieces(ladder.model.config, dynamic=True)
    attention = getattr(torch.ops.lab, OPS["PIECEWISE"])
    loops: list[handmade.PiecewiseLoop] = []

    def live(*inputs: Tensor) -> Tensor:
        return handmade.PiecewiseLoop(ladder.model, inputs, pieces).run_compiled(attention)

    def capture() -> None:
        pool = torch.cuda.graph_pool_handle()
        for size in reversed(ladder.sizes):
            loops.append(handmade.PiecewiseLoop(ladder.model, ladder.inputs(size, 0), pieces))
            loops[-1].capture(attention, pool)

    return Subject(live, capture, is_ours=False)


VARIANTS: dict[str, Callable[[Ladder], Subject]] = {
    "graphcap PIECEWISE": ours("PIECEWISE"),
    "graphcap PIECEWISE, num_warmups=1": ours("PIECEWISE", num_warmups=1),
    "graphcap FULL": ours("FULL"),
    "graphcap FULL, num_warmups=0": ours("FULL", num_warmups=0),
    "hand-made PIECEWISE": hand_piecewise,
    "hand-made FULL": hand_full,
}


def libraries(ladder: Ladder) -> dict[str, float]:
    """Seconds for a live call of each size: the first one, when libraries prepare for it, and the next one."""
    model = with_attention(ladder.model, "PIECEWISE")
    model(*ladder.inputs(ladder.most, seed=0))  # what does not depend on a size
    handmade.capture_nothing(ladder.device)
    seconds = []
    for _ in range(2):
        harness.synchronize(ladder.device)
        start = time.perf_counter()
        for size in reversed(ladder.sizes):
            model(*ladder.inputs(size, seed=0))
        harness.synchronize(ladder.device)
        seconds.append(time.perf_counter() - start)
    return dict(zip(("first calls", "next calls"), seconds, strict=True))


def captured(ladder: Ladder, subject: Subject) -> dict[str, Any]:
    """Capture every size: seconds, and MiB of device memory (None on a CPU)."""
    # Two sizes, so that no compilation is left: 1 may be special to a compiler.
    for size in (ladder.most, 1):
        subject.forward(*ladder.inputs(size, seed=0))
    harness.synchronize(ladder.device)
    before = harness.used_memory_mib(ladder.device)
    start = time.perf_counter()
    subject.capture()
    harness.synchronize(ladder.device)
    seconds = time.perf_counter() - start
    after = harness.used_memory_mib(ladder.device)
    memory = None if before is None or after is None else after - before
    row = {"num_sizes": len(ladder.sizes), "seconds": seconds, "memory_mib": memory}
    if subject.is_ours:
        row["num_graphs"] = sum(plan.num_segments for plan in plans(subject.forward))
    return row


def plans(target: Any) -> list[Any]:
    """What is captured now."""
    return [plan for region in graphcap.explain(target).regions for plan in region.plans]


def live_calls(target: Any) -> int:
    """Calls so far that no graph served."""
    return sum(sum(region.live_calls.values()) for region in graphcap.explain(target).regions)


def row_errors(rows: Tensor, reference: Tensor) -> Tensor:
    """The relative error of each row."""
    return (rows.float() - reference).norm(dim=-1) / reference.norm(dim=-1)


def traffic_sizes(ladder: Ladder, num_calls: int) -> list[int]:
    choose = random.Random(0)
    return [choose.randint(1, ladder.most) for _ in range(num_calls)]


def references(ladder: Ladder, sizes: list[int]) -> list[Tensor]:
    """The fp32 model's rows for every call of the traffic, in order: each call writes the KV caches for later ones."""
    ladder.fill_caches()
    wide = models.float_copy(ladder.model)
    return [wide(*ladder.inputs(size, seed)) for seed, size in enumerate(sizes, start=1)]


def served(ladder: Ladder, subject: Subject, sizes: list[int], expected: list[Tensor]) -> dict[str, Any]:
    """Serve the traffic with captures forbidden."""
    ladder.fill_caches()
    live_before, worst, wrong = live_calls(subject.forward), 0.0, 0
    memory: float | None = None
    with graphcap.allow_capture(False):
        for seed, (size, reference) in enumerate(zip(sizes, expected, strict=True), start=1):
            errors = row_errors(subject.forward(*ladder.inputs(size, seed)), reference)
            wrong += int((~(errors <= WRONG)).sum())
            worst = max(worst, float(errors.max()))
            if seed == max(1, len(sizes) // 10):
                memory = harness.used_memory_mib(ladder.device)
    after = harness.used_memory_mib(ladder.device)
    beyond = sum(size > ladder.sizes[-1] for size in sizes)
    return {
        "num_calls": len(sizes),
        "num_rows": sum(sizes),
        "wrong_rows": wrong,
        "worst_row": worst,
        "live_in_ladder": live_calls(subject.forward) - live_before - beyond,
        "grown_mib": None if memory is None or after is None else after - memory,
    }


@dataclass
class Worker:
    """A thread that calls a model with rows of a table and compares what comes out; ``largest`` is the last rung."""

    model: Forward
    table: Tensor
    expected: Tensor
    most: int
    largest: int
    seed: int
    num_calls: int = 0
    num_beyond: int = 0
    num_rows: int = 0
    wrong_rows: int = 0
    worst_row: float = 0.0
    error: str = ""

    def run(self, deadline: float) -> None:
        """Until the deadline; an exception ends it and is kept."""
        try:
            with torch.inference_mode():
                if self.table.device.type == "cuda":
                    with torch.cuda.stream(harness.side_stream()):
                        self._calls(deadline)
                else:
                    self._calls(deadline)
        except Exception as error:
            self.error = harness.failure(error)

    def _calls(self, deadline: float) -> None:
        choose = random.Random(self.seed)
        while time.monotonic() < deadline:
            size, start = choose.randint(1, self.most), choose.randrange(len(self.table) - self.most)
            chosen = slice(start, start + size)
            errors = row_errors(self.model(self.table[chosen]), self.expected[chosen])
            self.wrong_rows += int((~(errors <= WRONG)).sum())
            self.worst_row = max(self.worst_row, float(errors.max()))
            self.num_calls += 1
            self.num_beyond += size > self.largest
            self.num_rows += size


def threads(ladder: Ladder, hidden: int, num_threads: int, seconds: float) -> dict[str, Any]:
    """num_threads threads over two models; a row that says what they found."""
    device, dtype, table_rows = ladder.device, ladder.model.embed.weight.dtype, 16 * ladder.most
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(table_rows, hidden, generator=generator).to(device, dtype)
    subjects, before = [], 0
    for seed in range(2):
        with torch.inference_mode(mode=False), torch.no_grad():
            model = rowwise.build_rowwise(hidden, 4, device, dtype, seed)
        expected = models.float_copy(model)(table.float())
        options = {**graphcaps.device_options(device), **ladder.options, "cudagraph_mode": "PIECEWISE"}
        options |= {"capture_sizes": ladder.sizes, "max_padding_ratio": 0.9}
        graphcap.compile(model, dynamic_arg_dims={"x": {0: "num_tokens"}}, **options)
        model(table[: ladder.most])
        graphcap.capture(model, lambda key: ((table[: key.num_tokens],), {}))
        before += live_calls(model)
        subjects.append((model, expected))
    workers = []
    for seed in range(num_threads):
        model, expected = subjects[seed % 2]
        workers.append(Worker(model, table, expected, ladder.most, ladder.sizes[-1], seed))
    deadline = time.monotonic() + seconds
    running = [threading.Thread(target=worker.run, args=(deadline,)) for worker in workers]
    with graphcap.allow_capture(False):
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
    row: dict[str, Any] = {name: sum(getattr(each, name) for each in workers) for name in COUNTED}
    row["worst_row"] = max(worker.worst_row for worker in workers)
    live = sum(live_calls(model) for model, _ in subjects) - before
    row["live_in_ladder"] = live - sum(worker.num_beyond for worker in workers)
    errors = [worker.error for worker in workers if worker.error]
    return {**row, "status": errors[0] if errors else "ok"}


COUNTED = ("num_calls", "num_rows", "wrong_rows")


def run_variant(ladder: Ladder, name: str, num_calls: int, record: Record) -> None:
    """Libraries, capture and traffic of one variant; hand-made ladders have no traffic of their own."""
    sizes, name_of_model = traffic_sizes(ladder, num_calls), ladder.model.config.name
    for calls, seconds in libraries(ladder).items():  # the row of the last variant stays
        key = {"model": name_of_model, "part": "libraries", "variant": f"eager, {calls}"}
        record.put({**key, "status": "ok", "num_sizes": len(ladder.sizes), "seconds": seconds})
        say(f"  eager, {calls} of each size: {seconds:.3f} s")
    key = {"model": name_of_model, "part": "capture", "variant": name}
    try:
        subject = VARIANTS[name](ladder)
        record.put({**key, "status": "ok", **(row := captured(ladder, subject))})
        say(f"  {name}: {row}")
        if subject.is_ours:
            key["part"] = "traffic"
            expected = references(ladder, sizes)
            record.put({**key, "status": "ok", **(row := served(ladder, subject, sizes, expected))})
            say(f"  {name}: {row}")
    except Exception as error:
        status = harness.failure(error)
        record.put({**key, "status": status})
        say(f"  {name}: {status}")


def run_threads(ladder: Ladder, arguments: argparse.Namespace, record: Record) -> None:
    name = ladder.model.config.name
    row = threads(ladder, models.CONFIGS[name].hidden_size, arguments.threads, arguments.seconds)
    record.put({"model": name, "part": "threads", "variant": "graphcap PIECEWISE", **row})
    say(f"  threads: {row}")


def parse_arguments() -> argparse.Namespace:
    parser = harness.common_arguments(__doc__ or "", ("0.6b",), "ladder.json")
    parser.add_argument("--calls", type=int, default=1000, help="calls of the traffic; default %(default)s")
    parser.add_argument("--threads", type=int, default=8, help="default %(default)s; 0 leaves that part out")
    parser.add_argument("--seconds", type=float, default=60, help="of the threads; default %(default)s")
    return parser.parse_args()


def run_part(arguments: argparse.Namespace, name_of_model: str, variant: str | None) -> None:
    """One variant of one model; without one, the threads."""
    device = harness.default_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    record = Record(arguments.json, "ladder", device, key=("model", "part", "variant"))
    sizes, most = ((1, 2, 4, 8), 10) if arguments.tiny else (SIZES, 300)
    with torch._dynamo.config.patch(recompile_limit=64), torch.inference_mode():
        with torch.inference_mode(mode=False), torch.no_grad():
            # Half the usual context: the proof of padding needs room for three copies of the caches.
            config = models.CONFIGS[name_of_model]
            config = dataclasses.replace(config, context=config.context // 2)
            model = models.build_decoder(config, device, dtype, most + 1)
        ladder = Ladder(model, sizes, most, json.loads(arguments.graphcap_options))
        ladder.fill_caches()
        if variant is None:
            run_threads(ladder, arguments, record)
        else:
            run_variant(ladder, variant, arguments.calls, record)
    torch._dynamo.reset()


def in_own_process(arguments: argparse.Namespace, name_of_model: str, variant: str | None) -> None:
    """:func:`run_part`, as if nothing had run before."""
    process = multiprocessing.get_context("spawn").Process(target=run_part, args=(arguments, name_of_model, variant))
    process.start()
    process.join()
    if process.exitcode:
        say(f"  {variant or 'threads'}: its process ended with {process.exitcode}")


def main() -> None:
    arguments = parse_arguments()
    names = [name for name in VARIANTS if harness.selected(name, arguments.only)]
    run = run_part if arguments.tiny else in_own_process  # whose times mean something
    for name_of_model in ["tiny"] if arguments.tiny else harness.words(arguments.models):
        say(f"{name_of_model}:")
        for variant in (*names, *[None] * bool(arguments.threads)):
            run(arguments, name_of_model, variant)


if __name__ == "__main__":
    main()
