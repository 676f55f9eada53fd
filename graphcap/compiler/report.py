"""What ``graphcap.explain()`` returns: dataclasses, a table as ``str(report)``, JSON-ready as ``report.to_dict()``.

A report is a snapshot. It holds no tensor, no graph and no module.
"""

from __future__ import annotations

import dataclasses
import enum
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graphcap.compiler.region import PieceRecord, Region
from graphcap.compiler.report_table import table
from graphcap.config import Config
from graphcap.cudagraph import PlanStats, RunnerStats

MIB = 2**20


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
        capture: whether a CUDA graph may hold it: ``"always"``, ``"full"`` (in FULL only), ``"never"``.
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
        mib: growth of device memory in MiB.
        seconds: how long the capturing call took.
        replays: calls that it served.
    """

    key: tuple[Any, ...]
    mode: str
    num_segments: int
    captured: tuple[str, ...]
    live: dict[str, str]
    mib: float
    seconds: float
    replays: int


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
        seconds: our part of the compile.
        pieces: in execution order.
        key_sizes: size symbol in the graph key -> the input that carries it.
        live_sizes: size symbol outside of it -> the reason.
        plans: what is captured now.
        replays: calls served by a plan, dropped plans included.
        live_calls: reason -> calls without a graph.
        failures: captures that failed.
        recaptures: plans captured again because an address had moved; ``moves`` counts by input.
        evictions: plans dropped.
        bindings: input -> how it gets into the latest plan (``"static"``, ``"copied"``...).
        settings: every setting.
        dump_dir: where its dump lies, ``""`` without one.
        notes: remarks.
    """

    name: str
    function: str
    location: str
    compile_id: str
    recompiled_because: str
    bypass: str
    no_capture: str
    seconds: float
    pieces: tuple[PieceReport, ...]
    key_sizes: dict[str, str]
    live_sizes: dict[str, str]
    plans: tuple[PlanReport, ...]
    replays: int
    live_calls: dict[str, int]
    failures: tuple[str, ...]
    recaptures: int
    evictions: int
    moves: dict[str, int]
    bindings: dict[str, str]
    settings: tuple[SettingReport, ...]
    dump_dir: str
    notes: tuple[str, ...]

    @classmethod
    def of(cls, region: Region) -> RegionReport:
        """A snapshot of a region and of what its runners have counted so far."""
        all_stats = [runner.stats for runner in region.runners]
        return cls(
            name=region.name,
            function=region.function,
            location=region.location,
            compile_id=region.compile_id,
            recompiled_because=region.recompiled_because,
            bypass=region.bypass,
            no_capture=region.no_capture,
            seconds=region.seconds,
            pieces=_pieces(region.pieces),
            key_sizes=dict(region.key_sizes),
            live_sizes=dict(region.live_sizes),
            plans=tuple(_plan(plan) for stats in all_stats for plan in stats.plans),
            replays=sum(stats.replays for stats in all_stats),
            failures=tuple(failure for stats in all_stats for failure in stats.failures),
            recaptures=sum(stats.recaptures for stats in all_stats),
            evictions=sum(stats.evictions for stats in all_stats),
            settings=_settings(region.config),
            dump_dir=region.dump_dir,
            notes=tuple(region.notes),
            **_merged(all_stats),
        )


@dataclass(frozen=True)
class Report:
    """What graphcap did with one target, or with everything in the process.

    Attributes:
        target: what was asked about, ``"this process"`` without an argument.
        regions: oldest first.
        message: what to do where there is nothing to report, ``""`` otherwise.
        notes: what ``graphcap.compile`` decided about the target.
    """

    target: str
    regions: tuple[RegionReport, ...]
    message: str = ""
    notes: tuple[str, ...] = ()

    @property
    def recompiles(self) -> dict[str, str]:
        """Region -> the guard whose failure made it."""
        return {region.name: region.recompiled_because for region in self.regions if region.recompiled_because}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: dicts, lists, strings, numbers."""
        plain = _plain(dataclasses.asdict(self))
        assert isinstance(plain, dict)
        return plain

    def __str__(self) -> str:
        return table(self)


def _pieces(records: Sequence[PieceRecord]) -> tuple[PieceReport, ...]:
    return tuple(_piece(records, index) for index in range(len(records)))


def _piece(records: Sequence[PieceRecord], index: int) -> PieceReport:
    record = records[index]
    count = 1 + sum(other.twin_of == index for other in records)
    fusions = [
        FusionReport(each.name, each.matches, each.replaced, tuple(each.sites), count, each.error or "")
        for each in record.passes
        if each.matches or each.error
    ]
    return PieceReport(
        name=record.name,
        kind=record.kind,
        capture=record.capture,
        reason=record.reason,
        module_path=record.module_path,
        source=record.source,
        num_nodes=record.num_nodes,
        mutates=record.mutates,
        origin=record.origin,
        seconds=record.seconds,
        key=record.key,
        twin_of="" if record.twin_of is None else records[record.twin_of].name,
        note=record.note,
        fusions=tuple(fusions),
    )


def _plan(plan: PlanStats) -> PlanReport:
    return PlanReport(
        key=plan.key,
        mode=plan.mode,
        num_segments=plan.num_segments,
        captured=tuple(plan.captured),
        live=dict(plan.live),
        mib=plan.bytes / MIB,
        seconds=plan.seconds,
        replays=plan.replays,
    )


def _merged(all_stats: Sequence[RunnerStats]) -> dict[str, dict[str, Any]]:
    """The counters by name, added up over a region's runners (one, and one per specialised size)."""
    live_calls: Counter[str] = Counter()
    moves: Counter[str] = Counter()
    bindings: dict[str, str] = {}
    for stats in all_stats:
        live_calls.update(stats.live_calls)
        moves.update(stats.moves)
        bindings.update(stats.bindings)
    return {"live_calls": dict(live_calls), "moves": dict(moves), "bindings": bindings}


def _settings(config: Config) -> tuple[SettingReport, ...]:
    return tuple(SettingReport(name, _plain(value), origin) for name, value, origin in config.describe())


def _plain(value: Any) -> Any:
    """The value with nothing in it that JSON does not know."""
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return getattr(value, "__qualname__", None) or repr(value)
