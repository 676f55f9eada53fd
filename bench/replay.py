"""What a replay costs the host, by batch size and by what graphcap is told to promise.

The lab decoder of ``bench/models.py``, measured as ``bench/decode.py`` does (interleaved rounds, step and host times,
error against fp32), with three differences: every variant is compiled once, with a dynamic batch, and captured at each
batch size; graphcap's output policies and guard settings are variants of their own; and eager is left out. The rows of
many batch sizes are a curve: ``python -m bench.plot`` draws it.

Floats of the model are constants (``specialize_float``), as they are without ``dynamic=True``: with it Dynamo makes
each of them, 57 here, a tensor on every call and a number again, in every variant that goes through it.

    PYTHONPATH=. python -m bench.replay                    # batch sizes 1 to 256, 0.6b
    PYTHONPATH=. python -m bench.replay --batch 1,64 --rounds 7
    PYTHONPATH=. python -m bench.replay --tiny             # CPU: tries the bench; simulated device, meaningless times
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

import graphcap
from bench import decode, graphcaps, handmade, harness, models
from bench.decode_variants import HAND_FULL, HAND_PIECEWISE, Forward, Group, graphcap_options, model_for
from bench.harness import say
from bench.record import Record

Builder = Callable[["AnyBatch"], Forward]


@dataclass
class AnyBatch(Group):
    """A group whose variants are compiled once for all batch sizes: what they compiled stays in ``made``."""

    made: dict[str, Any] = field(default_factory=dict)
    batches: tuple[int, ...] = ()

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What another batch size has made under this name, or made now."""
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]


def compiled(group: AnyBatch, **options: Any) -> Forward:
    """torch.compile with a dynamic batch."""
    made: Forward = group.once(
        f"compiled {options}", lambda: torch.compile(models.share_tensors(group.model), dynamic=True, **options)
    )
    return made


def hand_full(group: AnyBatch) -> Forward:
    return handmade.full_graph(compiled(group), group.inputs(seed=0))


def hand_piecewise(group: AnyBatch) -> Forward:
    handmade.require_cuda(group.model.rotary)
    pieces = group.once("pieces", lambda: handmade.CompiledPieces(group.model.config, dynamic=True))
    loop = handmade.PiecewiseLoop(group.model, group.inputs(seed=0), pieces)
    loop.capture(models.attention)
    return loop.step(torch.ops.lab.attention.default)


def ours(mode: str, as_backend: bool = False, **settings: Any) -> Builder:
    """graphcap with these settings: the decorator's path, or torch.compile's."""

    def make(group: AnyBatch) -> Forward:
        options = {**graphcap_options(group, mode), "capture_sizes": group.batches, **settings}
        model = model_for(group, mode)
        if as_backend:
            return torch.compile(model, backend=graphcaps.backend(), dynamic=True, options=options)
        return graphcap.compile(model, **options)

    def build(group: AnyBatch) -> Forward:
        made: Forward = group.once(f"{mode} {as_backend} {settings}", functools.partial(make, group))
        return made

    return build


FAST = {"outputs": "static", "guards": "sealed"}
VARIANTS: dict[str, Builder] = {
    "torch.compile reduce-overhead": lambda group: compiled(group, mode="reduce-overhead"),
    HAND_FULL: hand_full,
    "graphcap FULL": ours("FULL"),
    "graphcap FULL (backend)": ours("FULL", as_backend=True),
    "graphcap FULL sealed": ours("FULL", guards="sealed"),
    "graphcap FULL static": ours("FULL", outputs="static"),
    "graphcap FULL static sealed": ours("FULL", **FAST),
    HAND_PIECEWISE: hand_piecewise,
    "graphcap PIECEWISE": ours("PIECEWISE"),
    "graphcap PIECEWISE static sealed": ours("PIECEWISE", **FAST),
}


def parse_arguments() -> argparse.Namespace:
    parser = harness.common_arguments(__doc__ or "", ("0.6b",), "replay.json")
    parser.add_argument("--batch", default="1,2,4,8,16,32,64,128,256", help="comma separated; default %(default)s")
    parser.add_argument("--steps", type=int, default=50, help="steps per round; default %(default)s")
    parser.add_argument("--rounds", type=int, default=4, help="default %(default)s")
    parser.add_argument("--explain", action="store_true", help="print graphcap's report of each of its variants")
    parser.set_defaults(count_launches=False)
    return parser.parse_args()


def run(name: str, batches: tuple[int, ...], record: Record, arguments: argparse.Namespace) -> None:
    """All batch sizes of one model."""
    device = harness.default_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.inference_mode(mode=False), torch.no_grad():
        model = models.build_decoder(models.CONFIGS[name], device, dtype, max(batches))
    options, made = json.loads(arguments.graphcap_options), {}
    variants: Mapping[str, Any] = VARIANTS
    for batch in batches:
        say(f"{name}, batch {batch}")
        group = AnyBatch(model, batch, device, options, variants=variants, made=made, batches=batches)
        decode.run_group(group, record, arguments)


def main() -> None:
    arguments = parse_arguments()
    record = Record(arguments.json, "replay", harness.default_device(), key=("model", "batch", "variant"))
    batches = tuple(sorted({int(batch) for batch in harness.words(arguments.batch)}))
    with torch._dynamo.config.patch(recompile_limit=64, specialize_float=True), torch.inference_mode():
        for name in ["tiny"] if arguments.tiny else harness.words(arguments.models):
            run(name, batches, record, arguments)
            torch._dynamo.reset()
            harness.collect_garbage(harness.default_device())


if __name__ == "__main__":
    main()
