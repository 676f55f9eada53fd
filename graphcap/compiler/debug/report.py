"""What ``graphcap.explain()`` returns: dataclasses, a table as ``str(report)``, JSON-ready as ``report.to_dict()``.

A report is a snapshot. It holds no tensor, no graph and no module.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from graphcap.compiler.debug.metrics import metrics_of
from graphcap.compiler.debug.report_table import table
from graphcap.cudagraph.counters.traffic import Traffic


@dataclass(frozen=True)
class FusionReport:
    """What one of our passes did to one piece and all its twins.

    Attributes:
        name: the pass.
        matches: places in one piece where its pattern was found.
        replaced: places that were rewritten; the others were left to Inductor.
        sites: one line per match with the user's ``file:line`` and module path, as found when the artifact was made.
        count: pieces that run this code.
        error: why the pass failed, ``""`` when it did not.
    """

    name: str
    matches: int
    replaced: int
    sites: tuple[str, ...]
    count: int
    error: str


@dataclass(frozen=True)
class PieceReport:
    """One piece of a region.

    Attributes:
        name: ``"piece_3"``, in execution order.
        kind: ``"captured"``, ``"compiled"`` (by Inductor, run live) or ``"eager"`` (as it is).
        capture: whether a CUDA graph may hold it: ``"always"``, ``"full"`` (in FULL only), ``"uniform_batch"``,
            ``"uniform_single_token"`` (in FULL plans of such batches only), ``"never"``.
        reason: why it was cut out or runs live, ``""`` otherwise.
        module_path: the module that wrote its first operation: ``"model.layers.3.self_attn"``.
        source: ``file:line`` of its first operation.
        num_nodes: operations in it.
        mutates: the inputs that it writes.
        origin: ``"compiled"``, ``"cache"``, ``"eager"``, ``"failed"``.
        seconds: compile or load time; 0 for a twin.
        key: the content key of its artifact, ``""`` without one.
        twin_of: the piece whose code it shares, ``""`` for the first of its kind.
        note: why the cache missed, or why it could not be compiled.
        fusions: what our passes did; empty for a twin, see the piece it is a twin of.
    """

    name: str
    kind: str
    capture: str
    reason: str
    module_path: str
    source: str
    num_nodes: int
    mutates: tuple[str, ...]
    origin: str
    seconds: float
    key: str
    twin_of: str
    note: str
    fusions: tuple[FusionReport, ...]


@dataclass(frozen=True)
class PlanReport:
    """One captured shape.

    Attributes:
        key: the values of the sizes in the key.
        mode: ``"FULL"`` or ``"PIECEWISE"``.
        num_segments: CUDA graphs that one replay launches.
        captured: the pieces inside.
        live: the pieces that run live, each with the reason.
        mib: growth of device memory by the capture, in MiB.
        seconds: how long the capturing call took.
        replays: calls that it served.
        shared_mib: of ``mib`` what other plans use as well; the rest goes when this plan goes.
    """

    key: tuple[Any, ...]
    mode: str
    num_segments: int
    captured: tuple[str, ...]
    live: dict[str, str]
    mib: float
    seconds: float
    replays: int
    shared_mib: float = 0.0


@dataclass(frozen=True)
class SettingReport:
    """One field of the configuration; ``origin`` is ``"default"``, ``"code"``, ``"mode"`` or ``"env GRAPHCAP_X"``."""

    name: str
    value: Any
    origin: str


@dataclass(frozen=True)
class RegionReport:
    """One graph that Dynamo handed over.

    Attributes:
        name: unique in the process.
        function: the traced function; ``location`` is its ``file:line``.
        compile_id: Dynamo's ``"frame/recompile"``.
        recompiled_because: the guard that failed, ``""`` for a first compile.
        bypass: why nothing of ours runs here, ``""`` otherwise.
        no_capture: why nothing is captured here, ``""`` where it may be.
        device: what captures: ``"cuda:0"``, ``"simulated"``; ``""`` where nothing does.
        seconds: our part of the compile.
        pieces: in execution order.
        key_sizes: size symbol in the graph key -> the input that carries it.
        live_sizes: size symbol outside of it -> the reason.
        plans: what is captured now.
        replays: calls served by a plan, dropped plans included.
        live_calls: reason -> calls without a graph.
        failures: captures that failed.
        divergences: replays that differed from a live run; what is named there runs live since.
        unchecked: operations captured on trust, or pieces, that were not compared with a live run, and why.
        recaptures: plans captured again because an address had moved; ``moves`` counts by input.
        evictions: plans dropped.
        bindings: input -> how it gets into the latest plan (``"static"``, ``"copied"``...).
        settings: every setting.
        dump_dir: where its dump lies, ``""`` without one.
        notes: remarks.
        traffic: the sizes of the calls and the rungs that served them.
        captures: plans that were ever captured; ``capture_seconds`` is the time that took.
        alerts: what in these counters somebody should look at, each with what to do.
    """

    name: str
    function: str
    location: str
    compile_id: str
    recompiled_because: str
    bypass: str
    no_capture: str
    device: str
    seconds: float
    pieces: tuple[PieceReport, ...]
    key_sizes: dict[str, str]
    live_sizes: dict[str, str]
    plans: tuple[PlanReport, ...]
    replays: int
    live_calls: dict[str, int]
    failures: tuple[str, ...]
    divergences: tuple[str, ...]
    unchecked: dict[str, str]
    recaptures: int
    evictions: int
    moves: dict[str, int]
    bindings: dict[str, str]
    settings: tuple[SettingReport, ...]
    dump_dir: str
    notes: tuple[str, ...]
    traffic: Traffic = field(default_factory=Traffic)
    captures: int = 0
    capture_seconds: float = 0.0
    alerts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """What graphcap did with one target, or with everything in the process.

    Attributes:
        target: what was asked about, ``"this process"`` without an argument.
        regions: oldest first.
        message: what to do where there is nothing to report, ``""`` otherwise.
        notes: what ``graphcap.compile`` decided about the target.
        unchecked_guards: with ``guards="sealed"`` the guards that are not evaluated on every call.
    """

    target: str
    regions: tuple[RegionReport, ...]
    message: str = ""
    notes: tuple[str, ...] = ()
    unchecked_guards: tuple[str, ...] = ()

    @property
    def recompiles(self) -> dict[str, str]:
        """Region -> the guard whose failure made it."""
        return {region.name: region.recompiled_because for region in self.regions if region.recompiled_because}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: dicts, lists, strings, numbers."""
        found = plain(dataclasses.asdict(self))
        assert isinstance(found, dict)
        return found

    def metrics(self) -> dict[str, int | float]:
        """The counters as one flat dict, for Prometheus; :mod:`graphcap.compiler.debug.metrics` lists the keys."""
        return metrics_of(self.regions)

    def __str__(self) -> str:
        return table(self)


def plain(value: Any) -> Any:
    """The value with nothing in it that JSON does not know."""
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return getattr(value, "__qualname__", None) or repr(value)
