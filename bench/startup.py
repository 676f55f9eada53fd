"""How long is the first call in a new process, with a cold and with a warm cache?

Every measurement is a new Python process that imports torch, builds the lab decoder (random weights, batch 1), compiles
it and calls it. *Cold* starts with empty cache directories (graphcap's, Inductor's, Triton's); *warm* is the next
process with the same directories. Seconds, from inside the child:

- *import*: ``import torch`` and, for graphcap's variants, ``import graphcap``;
- *first call*: from wrapping the model until its first result is on the device. Of that, as torch counts it: *Dynamo*
  (tracing and guards, without the backend) and *backend* (splitting, Inductor, loading of artifacts);
- *second* and *third call*: where CUDA graphs are warmed up and captured;
- *process*: from its start to its end, model building and interpreter included.

    PYTHONPATH=. python -m bench.startup
    PYTHONPATH=. python -m bench.startup --tiny      # CPU: tries the bench; simulated device
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

#: the child prints its measurement on a line that starts so
MARK = "startup-result "
VARIANTS = ("graphcap FULL", "graphcap PIECEWISE", "torch.compile default")
CALLS = 3


def phase_seconds() -> dict[str, float | None]:
    """Dynamo's and the backend's share of all compilation so far, None where torch does not tell."""
    from torch._dynamo.utils import compile_times

    names, seconds = compile_times(repr="csv", aggregate=True)
    times = dict(zip(names, map(str, seconds), strict=True))
    whole, backend = (times.get(name) for name in ("_compile.compile_inner", "OutputGraph.call_user_compiler"))
    if whole is None or backend is None:
        return {"dynamo_s": None, "backend_s": None}
    return {"dynamo_s": float(whole) - float(backend), "backend_s": float(backend)}


def child(variant: str, model_name: str, options: dict[str, Any]) -> None:
    """Measure one start and print it. Imports are inside because they are part of what is measured.

    The model's copy that the variants of ``bench/decode_variants.py`` make (over shared tensors) costs milliseconds.
    """
    start = time.perf_counter()
    import torch

    if variant.startswith("graphcap"):
        import graphcap  # noqa: F401
    imported = time.perf_counter()

    from bench import decode_variants, harness, models

    device = harness.default_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.no_grad():
        model = models.build_decoder(models.CONFIGS[model_name], device, dtype, max_sequences=1)
    harness.synchronize(device)

    calls = []
    with torch.inference_mode():
        inputs = [models.decode_inputs(model.config, device, 1, seed) for seed in range(CALLS)]
        harness.synchronize(device)
        last = time.perf_counter()
        forward = decode_variants.VARIANTS[variant](decode_variants.Group(model, 1, device, options))
        for arguments in inputs:
            forward(*arguments)
            harness.synchronize(device)
            now = time.perf_counter()
            calls.append(now - last)
            last = now
    names = ("first_call_s", "second_call_s", "third_call_s")
    result = {"import_s": imported - start, **dict(zip(names, calls, strict=True)), **phase_seconds()}
    print(MARK + json.dumps(result), flush=True)


def start_process(variant: str, model: str, options: str, caches: Path) -> dict[str, float | None]:
    """One new process over the given cache directories; its measurement with ``process_s`` added.

    Raises:
        RuntimeError: the child failed; the message has the end of its output.
    """
    names = {"GRAPHCAP_CACHE_DIR": "graphcap", "TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
    environment = {**os.environ, **{name: str(caches / part) for name, part in names.items()}}
    command = [sys.executable, "-m", "bench.startup", "--child", variant, "--models", model]
    command += ["--graphcap-options", options]
    start = time.perf_counter()
    root = Path(__file__).parents[1]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, cwd=root)
    seconds = time.perf_counter() - start
    results = [line.removeprefix(MARK) for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not results:
        raise RuntimeError(f"child ended with {done.returncode}: {(done.stdout + done.stderr)[-1500:]}")
    return {**json.loads(results[-1]), "process_s": seconds}


def median_of(starts: list[dict[str, float | None]]) -> dict[str, float | None]:
    """Field by field; None where a start did not tell."""
    medians: dict[str, float | None] = {}
    for name in starts[0]:
        values = [value for start in starts if (value := start[name]) is not None]
        medians[name] = statistics.median(values) if values else None
    return medians


def measure(variant: str, model: str, arguments: argparse.Namespace, record: Any) -> None:
    """A cold start, then warm ones over what it left, each as a row."""
    from bench import harness

    options = arguments.graphcap_options
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for cache, repeats in (("cold", 1), ("warm", arguments.rounds)):
            key = {"model": model, "variant": variant, "cache": cache}
            try:
                starts = [start_process(variant, model, options, Path(folder)) for _ in range(repeats)]
            except Exception as error:
                status = harness.failure(error)
                record.put({**key, "status": status})
                harness.say(f"{variant}, {cache}: {status}")
                return
            row = median_of(starts)
            record.put({**key, "status": "ok", "starts": repeats, **row})
            harness.say(f"{variant}, {cache}: " + ", ".join(f"{k} {v:.2f}" for k, v in row.items() if v is not None))


def main() -> None:
    if "--child" in sys.argv:
        parser = argparse.ArgumentParser()
        for name in ("--child", "--models", "--graphcap-options"):
            parser.add_argument(name)
        arguments = parser.parse_args()
        child(arguments.child, arguments.models, json.loads(arguments.graphcap_options))
        return

    from bench import harness
    from bench.record import Record

    parser = harness.common_arguments(__doc__ or "", ("0.6b",), "startup.json")
    parser.add_argument("--rounds", type=int, default=3, help="warm starts of a variant; default %(default)s")
    arguments = parser.parse_args()
    record = Record(arguments.json, "startup", harness.default_device(), key=("model", "variant", "cache"))
    for model in ["tiny"] if arguments.tiny else harness.words(arguments.models):
        for variant in VARIANTS:
            if harness.selected(variant, arguments.only):
                measure(variant, model, arguments, record)


if __name__ == "__main__":
    main()
