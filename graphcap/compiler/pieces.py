"""Give every piece a callable: from a twin in this region, from the cache, or from Inductor; eager where that is asked.

Nothing here takes a model down: a piece that Inductor cannot compile runs as it is, with the reason.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from graphcap.cache import ArtifactStore, Entry, PieceKey, cache_root, toolchain_identity
from graphcap.compiler import inductor, nodes, private
from graphcap.compiler.ambient import ambient_state, device_identity
from graphcap.compiler.canonical import canonical_symbols, canonical_text
from graphcap.compiler.effects import mutated_inputs, written_overlap
from graphcap.compiler.live import live_function, plain_function
from graphcap.compiler.shape_guards import ShapeGuards
from graphcap.compiler.specialise import example_arguments
from graphcap.compiler.split import Piece
from graphcap.config import Config
from graphcap.cudagraph import Capture
from graphcap.passes import PassPipeline, PassResult
from graphcap.progress import Progress

log = logging.getLogger(__name__)


@dataclass
class CompiledPiece:
    """What became of one piece.

    Attributes:
        call: takes its inputs positionally, returns a sequence of its outputs.
        mutates: the positions of the inputs that it writes.
        origin: ``"compiled"``, ``"cache"``, ``"eager"`` (not compiled, as asked), ``"failed"`` (runs as it is).
        key: the content key, ``""`` for eager pieces.
        seconds: compile or load time; 0 for a twin.
        twin_of: the index of the piece whose artifact this one shares.
        passes: what our passes did, for the piece that was compiled.
        output_code: Inductor's Python.
        note: why the cache missed, or why it could not be compiled.
        made_at: when this record was made, seconds since the epoch.
        plain: the piece as Python, called like ``call``; ``None`` where only the piece's module could run it.
    """

    call: Callable[..., Any]
    mutates: tuple[int, ...]
    origin: str
    key: str = ""
    seconds: float = 0.0
    twin_of: int | None = None
    passes: list[PassResult] = field(default_factory=list)
    output_code: str = ""
    note: str = ""
    made_at: float = field(default_factory=time.time)
    plain: Callable[..., Any] | None = None


def compile_pieces(
    pieces: Sequence[Piece], config: Config, device: torch.device, at: tuple[Any, int] | None = None
) -> list[CompiledPiece]:
    """Compile each distinct piece once.

    Args:
        pieces: in execution order.
        config: says whether pieces go through Inductor and whether the disk is used.
        device: the device whose architecture is part of the key.
        at: ``(symbol, size)`` to compile for that size only; pieces without the symbol stay as they are.

    Raises:
        PassRequiredError: when a pass that ``config`` requires matched in no piece.
    """
    compiler = _PieceCompiler(pieces, config, device)
    pipeline = PassPipeline(disable=config.disable_passes, require=config.require_passes)
    label = "compiling pieces" if at is None else f"compiling pieces for {at[0]} = {at[1]}"
    with Progress(label, len(pieces), enabled=config.progress) as bar:
        compiled = []
        for index, piece in enumerate(pieces):
            compiled.append(compiler.compile(index, None if at is None else example_arguments(piece, *at)))
            bar.advance()
    pipeline.check_required([result for piece in compiled for result in piece.passes])
    return compiled


class _PieceCompiler:
    """Remembers the distinct pieces of one region."""

    def __init__(self, pieces: Sequence[Piece], config: Config, device: torch.device) -> None:
        self.pieces, self.config, self.device = pieces, config, device
        self.root: Path | None = cache_root(config.cache_dir) if config.cache else None
        self.store = ArtifactStore(self.root) if self.root is not None else None
        self.seen: dict[str, tuple[int, CompiledPiece, inductor.Artifact | None]] = {}
        self.ambient = ambient_state(device.type)
        # Before anything is compiled: each compile adds to what is known about sizes, and twins would no longer agree.
        self.texts = [canonical_text(piece.module) for piece in pieces]
        self.known_guards = private.shape_guards(_fake_mode_of(*pieces))

    @property
    def scratch(self) -> Path | None:
        return self.root / "inductor" if self.root is not None else None

    def compile(self, index: int, example: list[Any] | None = None) -> CompiledPiece:
        """Compile a piece, for the sizes of ``example`` where that is given."""
        piece, text = self.pieces[index], self.texts[index]
        if example is not None:
            text += f"\nstatic {_sizes_of(example)}"
        twin = self._twin(piece, text)
        if twin is not None:
            return twin
        mutates = mutated_inputs(piece.module)
        if self.config.compiler == "eager" or not piece.verdict.compiled:
            result, artifact = CompiledPiece(self._as_is(piece), mutates, "eager"), None
        elif reason := self._reason_to_refuse(piece, mutates, example):
            result, artifact = CompiledPiece(self._as_is(piece), mutates, "failed", note=reason), None
        else:
            result, artifact = self._compile(piece, text, mutates, example)
        result.plain = plain_function(piece.module)
        self.seen[text] = (index, result, artifact)
        return result

    @staticmethod
    def _reason_to_refuse(piece: Piece, mutates: tuple[int, ...], example: list[Any] | None) -> str:
        symbolic = inductor.reason_to_refuse(piece.module) if example is None else ""
        return symbolic or written_overlap(piece.module, mutates)

    def _twin(self, piece: Piece, text: str) -> CompiledPiece | None:
        if text not in self.seen:
            return None
        index, first, artifact = self.seen[text]
        if artifact is not None and not self._holds(artifact.guards, piece):
            return None
        call = first.call if artifact is not None else self._as_is(piece)  # eager code may hold its own attributes
        plain = plain_function(piece.module)
        return CompiledPiece(call, first.mutates, first.origin, first.key, 0.0, twin_of=index, plain=plain)

    @staticmethod
    def _as_is(piece: Piece) -> Callable[..., Any]:
        """A piece that runs live is called by the shortest way; a captured one records the same kernels either way."""
        return live_function(piece.module) if piece.verdict.capture is not Capture.ALWAYS else piece.module.forward

    @staticmethod
    def _holds(guards: ShapeGuards, piece: Piece) -> bool:
        return guards.hold_for(canonical_symbols(piece.module), _fake_mode_of(piece))

    def _compile(
        self, piece: Piece, text: str, mutates: tuple[int, ...], example: list[Any] | None
    ) -> tuple[CompiledPiece, inductor.Artifact | None]:
        pipeline = PassPipeline(disable=self.config.disable_passes, require=self.config.require_passes)
        key = self._key(text, pipeline)
        try:
            artifact, origin, note, key = self._load_or_compile(piece, key, pipeline, example)
        except Exception as error:  # Inductor may raise anything; the piece still has its Python
            if private.restarts_trace(error):
                raise
            log.warning("%s could not be compiled and runs as it is: %s", piece.name, error, exc_info=True)
            note = f"{type(error).__name__}: {error}"
            return CompiledPiece(piece.module.forward, mutates, "failed", key.digest, note=note), None
        result = CompiledPiece(artifact.call, mutates, origin, key.digest, artifact.seconds, note=note)
        result.passes, result.output_code = artifact.passes, artifact.output_code
        return result, artifact

    def _key(self, text: str, pipeline: PassPipeline) -> PieceKey:
        patches = sorted((k, repr(v)) for k, v in self.config.inductor_compile_config.items())
        return PieceKey(
            graph=text,
            inputs="\n".join(self.ambient),
            passes=pipeline.fingerprint(),
            toolchain=toolchain_identity(),
            config=repr((sorted(private.codegen_config().items()), patches)),
            device=device_identity(self.device),
        )

    def _load_or_compile(
        self, piece: Piece, key: PieceKey, pipeline: PassPipeline, example: list[Any] | None
    ) -> tuple[inductor.Artifact, str, str, PieceKey]:
        if self.store is None:
            return self._through_inductor(piece, pipeline, None, example), "compiled", "cache off", key
        with self.store.lock(key):
            loaded, note = self._load(key)
            if loaded is None:
                artifact = self._through_inductor(piece, pipeline, self.scratch, example)
                payload = inductor.pack(artifact)
                failed = "Inductor cannot save it" if payload is None else self._save(piece, key, payload, artifact)
                return artifact, "compiled", "; ".join(filter(None, (note, failed and f"not stored: {failed}"))), key
        if self._holds(loaded.guards, piece):
            return loaded, "cache", "", key
        # Both sides of a guard have their entry: a start at the larger size is a warm one too.
        beyond = dataclasses.replace(key, inputs=f"{key.inputs}\nnot ({loaded.guards})")
        return self._load_or_compile(piece, beyond, pipeline, example)

    def _through_inductor(
        self, piece: Piece, pipeline: PassPipeline, scratch: Path | None, example: list[Any] | None
    ) -> inductor.Artifact:
        return inductor.compile_with_inductor(piece.module, pipeline, self.config, scratch, self.known_guards, example)

    def _load(self, key: PieceKey) -> tuple[inductor.Artifact | None, str]:
        assert self.store is not None
        entry = self.store.load(key)
        if not isinstance(entry, Entry):
            return None, f"cache miss: {entry.reason}"
        try:
            return inductor.unpack(entry.payload, self.scratch), ""
        except Exception as error:  # written by another torch in spite of the key, or a kernel that no longer builds
            log.warning("cache entry %s cannot be loaded and is compiled again: %s", key.digest[:12], error)
            return None, f"cache miss: cannot be loaded ({type(error).__name__}: {error})"

    def _save(self, piece: Piece, key: PieceKey, payload: bytes, artifact: inductor.Artifact) -> str | None:
        assert self.store is not None
        manifest = {
            "module": piece.module_path,
            "source": piece.source,
            "nodes": len(piece.nodes),
            "seconds": round(artifact.seconds, 3),
            "guards": str(artifact.guards),
            "passes": {result.name: result.matches for result in artifact.passes},
            "device": key.device,
        }
        return self.store.save(key, payload, manifest)


def _fake_mode_of(*pieces: Piece) -> Any:
    """The mode of the fake tensors in these pieces, ``None`` when they hold none; the pieces of a region share one."""
    return private.fake_mode_of([nodes.value_of(node) for piece in pieces for node in piece.module.graph.nodes])


def _sizes_of(example: Sequence[Any]) -> str:
    return str([tuple(value.shape) if isinstance(value, torch.Tensor) else value for value in example])
