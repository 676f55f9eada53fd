"""What graphcap knows about one compiled region, from the moment Dynamo hands over a graph until its code is dropped.

Every backend call opens one :class:`Region`: a graph break or a recompile makes another. ``explain()`` and the dumps
read them; nothing on the hot path does. A region holds no tensor and no plan alive.
"""

from __future__ import annotations

import itertools
import logging
import re
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch
from torch import fx

from graphcap.compiler import private
from graphcap.compiler.frontend.step_source import named_as_argument
from graphcap.compiler.inputs import input_name
from graphcap.compiler.pieces import CompiledPiece
from graphcap.compiler.runners import Runners, ids_of, is_mostly
from graphcap.compiler.split import Piece
from graphcap.compiler.symbols import SizeSymbols
from graphcap.config import CompilationMode, Config
from graphcap.cudagraph import GraphRunner, PlanStats
from graphcap.cudagraph.dispatch.revision import revise
from graphcap.errors import RecompileError

log = logging.getLogger(__name__)


@dataclass
class PieceRecord:
    """One line of a report: a piece, without the graph and the code that it was made from."""

    name: str
    kind: str
    capture: str
    reason: str
    module_path: str
    source: str
    num_nodes: int
    mutates: tuple[str, ...]
    origin: str
    key: str
    seconds: float
    twin_of: int | None
    note: str
    passes: list[Any]


@dataclass
class Region:
    """One graph that Dynamo handed over.

    Attributes:
        name: ``"forward_0"``: the traced function and a running number; unique in the process.
        function: the qualified name of the traced function.
        location: ``file:line`` of its definition.
        compile_id: Dynamo's ``"frame/recompile"``.
        recompiled_because: the guard that failed, ``""`` for a first compile.
        config: the settings it was compiled with.
        bypass: why nothing of ours runs here (``"grad mode ..."``), ``""`` otherwise.
        pieces: one record per piece, in execution order.
        key_sizes: the size symbols in the graph key, with the input that carries each.
        split_names: the entries of ``splitting_ops`` that its graph has, ``None`` where nobody looked.
        live_sizes: the size symbols outside of it, each with its reason.
        bounds: the sizes up to which compiled code holds, by symbol.
        no_capture: why no CUDA graphs are captured here (no GPU, mode NONE), ``""`` where they are.
        seconds: how long our part of the compile took.
        device: the name of the device that captures, ``""`` without one.
        source: the stitched function.
        dump_dir: where its dump lies, ``""`` without one.
        notes: one-line remarks for the report.
        on_plan: told of each captured plan.
        is_captured_ahead: whether :func:`graphcap.capture` has captured its ladder.
        crew: its graph runners.
    """

    name: str
    function: str
    location: str
    compile_id: str
    config: Config
    recompiled_because: str = ""
    bypass: str = ""
    pieces: list[PieceRecord] = field(default_factory=list)
    key_sizes: dict[str, str] = field(default_factory=dict)
    split_names: frozenset[str] | None = None
    live_sizes: dict[str, str] = field(default_factory=dict)
    bounds: dict[str, int] = field(default_factory=dict)
    no_capture: str = ""
    device: str = ""
    seconds: float = 0.0
    source: str = ""
    dump_dir: str = ""
    is_captured_ahead: bool = False
    crew: Runners = field(default_factory=Runners, repr=False)
    notes: list[str] = field(default_factory=list)
    on_plan: Callable[[PlanStats], None] | None = field(default=None, repr=False)
    code: CodeType | None = field(default=None, repr=False)
    _owner: Callable[[], Any] = field(default=lambda: None, repr=False)
    _tensors: list[weakref.ref[torch.Tensor]] = field(default_factory=list, repr=False)

    @property
    def owner(self) -> Any:
        """The module whose frame was traced, ``None`` for a function or when it is gone."""
        return self._owner()

    @property
    def runners(self) -> list[GraphRunner]:
        """Those that are still alive: one per model instance and specialised size."""
        return self.crew.alive

    @property
    def is_over(self) -> bool:
        """Whether what it was compiled for is gone: a function is not known to be."""
        alive = self.owner is not None or any(ref() is not None for ref in self._tensors) or bool(self.runners)
        return not alive and bool(self._tensors)

    def attach(self, runner: GraphRunner) -> None:
        """Let reports find the runner's counters without keeping it alive, and the dump its plans."""
        runner.stats.on_plan = self.on_plan
        self.crew.attach(runner)

    def watch_tensors(self, tensors: Sequence[torch.Tensor]) -> None:
        """Let reports find the region by the parameters and buffers that it uses."""
        self._tensors = [weakref.ref(tensor) for tensor in tensors]

    def shares_tensor_with(self, tensors: set[int]) -> bool:
        """Whether one of the region's parameters or buffers is among these (by ``id``): of the call that was traced, or
        of an instance that is served now (its weights may have been replaced since)."""
        return self.crew.have(tensors) or not tensors.isdisjoint(ids_of(self._tensors))

    def is_mostly_of(self, tensors: set[int]) -> bool:
        """Whether that is so of most of them."""
        return self.crew.have_most_of(tensors) or is_mostly(ids_of(self._tensors), tensors)

    def record_pieces(self, pieces: Sequence[Piece], compiled: Sequence[CompiledPiece], sizes: SizeSymbols) -> None:
        """Keep what a report needs of the pieces."""
        for piece, result in zip(pieces, compiled, strict=True):
            self.pieces.append(
                PieceRecord(
                    name=piece.name,
                    kind=piece.verdict.kind,
                    capture=piece.verdict.capture.value,
                    reason=piece.reason,
                    module_path=piece.module_path,
                    source=piece.source,
                    num_nodes=len(piece.nodes),
                    mutates=tuple(input_name(piece.inputs[position]) for position in result.mutates),
                    origin=result.origin,
                    key=result.key,
                    seconds=result.seconds,
                    twin_of=result.twin_of,
                    note=result.note,
                    passes=result.passes,
                )
            )
        self.key_sizes = {str(s): _bound_by(sizes.bound_by[s]) for s in sorted(sizes.key, key=str)}
        self.live_sizes = {str(s): reason for s, reason in sizes.live.items()}


def _bound_by(node: fx.Node) -> str:
    """The input that carries a size, as a user would say it: ``"input_ids dim 0"``."""
    return re.sub(r"\.(size|shape)(\(\))?\.(\d+)$", r" dim \3", input_name(node))


#: Above this number the regions of models that are gone are forgotten.
MAX_REGIONS = 1024

_regions: list[Region] = []
_lock = threading.Lock()
_numbers = itertools.count()


def open_region(gm: fx.GraphModule, example_inputs: Sequence[Any], config: Config) -> Region:
    """Register the region for the graph that Dynamo is compiling now.

    Raises:
        RecompileError: in DYNAMO_TRACE_ONCE, when this function of this object was traced before.
    """
    frame = private.current_frame()
    # With other settings it is another torch.compile of the same function, which Dynamo sees as a failed guard as well.
    same = [r for r in all_regions() if r.code is frame.code is not None and r.owner is frame.owner]
    earlier = [r for r in same if r.config == config]
    recompiled = bool(earlier) and not frame.compile_id.split("/")[-1].startswith("0")
    region = Region(
        name=f"{_short_name(frame)}_{next(_numbers)}",
        function=frame.function,
        location=frame.location,
        compile_id=frame.compile_id,
        config=config,
        recompiled_because=_why_recompiled(frame) if recompiled else "",
        code=frame.code,
        _owner=weakref.ref(frame.owner) if isinstance(frame.owner, torch.nn.Module) else lambda: None,
        _tensors=[weakref.ref(t) for t in example_inputs if private.is_static_input(t)],
    )
    if recompiled and config.compilation_mode is CompilationMode.DYNAMO_TRACE_ONCE:
        raise RecompileError(
            f"{region.function} was traced once and may not be traced again (compilation_mode=DYNAMO_TRACE_ONCE), but "
            f"a guard failed: {region.recompiled_because}. Make that value constant or its dim dynamic, or use "
            "PIECEWISE."
        )
    _warn_near_limit(region)
    _warn_of_unused_ladder(region, earlier)
    return register(region)


def register(region: Region) -> Region:
    """Let :func:`all_regions` find it."""
    with _lock:
        if len(_regions) >= MAX_REGIONS:
            _regions[:] = [each for each in _regions if not each.is_over]
        _regions.append(region)
    revise()
    return region


def _why_recompiled(frame: private.Frame) -> str:
    return named_as_argument(private.latest_guard_failure(frame.code)) or "unknown guard"


def _short_name(frame: private.Frame) -> str:
    if isinstance(frame.owner, torch.nn.Module):
        return type(frame.owner).__name__
    return frame.function.rpartition(".")[2].strip("<>") or "graph"


def _warn_near_limit(region: Region) -> None:
    index = region.compile_id.split("/")[-1].partition("_")[0]
    limit = private.recompile_limit()
    if index.isdigit() and int(index) + 1 >= limit:
        log.warning(
            "%s (%s) was compiled %d times, which is Dynamo's recompile_limit: the next call that fits none of these "
            "graphs runs eager. The last guard that failed: %s. Mark the changing size dynamic, or raise "
            "torch._dynamo.config.recompile_limit.",
            region.function, region.location, int(index) + 1, region.recompiled_because or "unknown",
        )  # fmt: skip
        region.notes.append(f"recompile_limit ({limit}) reached: a further miss runs eager")


def went_beyond(region: Region) -> bool:
    """Whether this trace is there because a call went beyond the bound of an earlier one of the same function."""
    same = [r for r in all_regions() if r is not region and r.code is region.code is not None]
    reason = region.recompiled_because or "unknown guard"
    return any(reason == "unknown guard" or f"<= {b} " in f"{reason} " for r in same for b in r.bounds.values())


def _warn_of_unused_ladder(region: Region, earlier: Sequence[Region]) -> None:
    if region.recompiled_because and any(each.is_captured_ahead for each in earlier):
        note = (
            "a call made another graph than the one whose ladder graphcap.capture() has captured, because of the guard "
            f"{region.recompiled_because}. Calls like it find none of those plans: capture with inputs like them"
        )
        region.notes.append(note)
        log.warning("%s (%s): %s", region.function, region.location, note)


def close_region(region: Region) -> None:
    """Forget a region whose trace Dynamo begins anew."""
    with _lock:
        if region in _regions:
            _regions.remove(region)
    revise()


def all_regions() -> list[Region]:
    """Every region of the process that was opened since :func:`forget_regions`, oldest first."""
    with _lock:
        return list(_regions)


def forget_regions() -> None:
    """Drop all records; the compiled code goes on."""
    with _lock:
        _regions.clear()
    revise()
