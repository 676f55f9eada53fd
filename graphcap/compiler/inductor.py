"""One piece through Inductor, with our passes inside, and back from the bytes that this made."""

from __future__ import annotations

import pickle
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import fx

from graphcap.compiler import nodes, private
from graphcap.compiler.canonical import canonical_symbols
from graphcap.compiler.shape_guards import ShapeGuards
from graphcap.compiler.symbols import symbols_of_node
from graphcap.config import Config
from graphcap.passes import PassPipeline, PassResult


@dataclass
class Artifact:
    """A compiled piece.

    Attributes:
        call: takes the piece's inputs positionally, returns a sequence of its outputs.
        guards: the sizes for which it is right.
        passes: what each of our passes did.
        output_code: the Python that Inductor generated.
        seconds: how long compiling or loading took.
        saved: the artifact's bytes, ``None`` where Inductor cannot save it.
    """

    call: Callable[..., Any]
    guards: ShapeGuards
    passes: list[PassResult]
    output_code: str
    seconds: float
    saved: bytes | None = field(default=None, repr=False)


def reason_to_refuse(module: fx.GraphModule) -> str:
    """Why a piece must not go through Inductor, which would compile it wrongly; ``""`` where it may.

    It lays out the result of a convolution of an unknown batch otherwise than the convolution does, and the compiled
    piece raises when it is called (torch 2.13, CPU).
    """
    for node in module.graph.nodes:
        is_convolution = node.op == "call_function" and getattr(node.target, "__name__", "").startswith("conv")
        if is_convolution and any(map(private.is_unbacked, symbols_of_node(node))):
            return f"Inductor misjudges the layout of a convolution of unknown batch size ({nodes.source_line(node)})"
    return ""


def compile_with_inductor(
    module: fx.GraphModule,
    pipeline: PassPipeline,
    config: Config,
    scratch: Path | None,
    known_guards: Sequence[Any],
    sizes: Sequence[Any] | None = None,
) -> Artifact:
    """Compile a piece.

    Args:
        module: the piece; its placeholders carry fake values.
        pipeline: our passes; runs inside Inductor's post-grad stage.
        config: gives the user's Inductor settings.
        scratch: where Inductor keeps kernels.
        known_guards: the shape guards that the piece's canonical text knows; later ones become the artifact's own.
        sizes: real tensors and ints to compile for those static sizes; ``None`` keeps the piece symbolic.

    Raises:
        Exception: whatever Inductor raises.
    """
    started = time.perf_counter()
    given = [nodes.value_of(node) for node in module.graph.nodes if node.op == "placeholder"]
    placeholders = [private.without_replaced_symbols(value) for value in given]
    fake_mode = private.fake_mode_of([nodes.value_of(node) for node in module.graph.nodes])
    # A salt of its own per compile: Inductor's cache must not answer for our store, or the passes would not run.
    pipeline.salt = secrets.token_hex(8)
    patches = {**config.inductor_compile_config, "post_grad_custom_pre_pass": pipeline, "triton.cudagraphs": False}
    with private.inductor_scratch(scratch), private.OutputCode() as code:
        compiled = private.standalone_compile(
            module, sizes or placeholders, fake_mode=fake_mode if sizes is None else None, patches=patches
        )
        saved = private.artifact_bytes(compiled)
    guards = ShapeGuards()
    if sizes is None:
        # Also those that an earlier piece of the region added: Inductor built on them without asking again.
        guards = ShapeGuards.added_since(known_guards, fake_mode, canonical_symbols(module))
    return Artifact(compiled, guards, list(pipeline.results), code.text, time.perf_counter() - started, saved)


def pack(artifact: Artifact) -> bytes | None:
    """The bytes that the cache keeps; ``None`` where Inductor cannot save the piece."""
    if artifact.saved is None:
        return None
    passes = [result.to_dict() for result in artifact.passes]
    return pickle.dumps((artifact.saved, artifact.guards.to_bytes(), passes, artifact.output_code))


def unpack(payload: bytes, scratch: Path | None) -> Artifact:
    """The inverse of :func:`pack`. Unpickles and runs code: give it only bytes that the store trusts."""
    started = time.perf_counter()
    saved, guards, passes, output_code = pickle.loads(payload)
    with private.inductor_scratch(scratch):
        call = private.load_artifact(saved)
    results = [PassResult.from_dict(result) for result in passes]
    return Artifact(call, ShapeGuards.from_bytes(guards), results, output_code, time.perf_counter() - started, saved)
