"""From the records of a region and the counters of its runners to a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from graphcap.compiler.debug.report import FusionReport, PieceReport, PlanReport, RegionReport, SettingReport, plain
from graphcap.compiler.region import PieceRecord, Region
from graphcap.compiler.split_names import remarks
from graphcap.config import Config
from graphcap.cudagraph import GraphRunner, PlanStats, RunnerStats
from graphcap.cudagraph.counters.alerts import alerts
from graphcap.cudagraph.counters.traffic import traffic_of

MIB = 2**20


def snapshot(region: Region, runners: Sequence[GraphRunner], gone: RunnerStats | None = None) -> RegionReport:
    """What is known about a region now, and what these of its runners have counted so far.

    Args:
        region: the region.
        runners: those that are still there.
        gone: what others have counted.
    """
    alive = [runner.stats for runner in runners]
    all_stats = [*alive, *filter(None, [gone])]
    return RegionReport(
        name=region.name,
        function=region.function,
        location=region.location,
        compile_id=region.compile_id,
        recompiled_because=region.recompiled_because,
        bypass=region.bypass,
        no_capture=region.no_capture,
        device=region.device,
        seconds=region.seconds,
        pieces=_pieces(region.pieces),
        key_sizes=dict(region.key_sizes),
        live_sizes=dict(region.live_sizes),
        plans=tuple(_plan(plan) for stats in alive for plan in stats.plans),
        replays=sum(stats.replays for stats in all_stats),
        failures=tuple(failure for stats in all_stats for failure in stats.failures),
        divergences=tuple(text for stats in all_stats for text in stats.divergences),
        unchecked={name: reason for stats in all_stats for name, reason in stats.unchecked.items()},
        recaptures=sum(stats.recaptures for stats in all_stats),
        evictions=sum(stats.evictions for stats in all_stats),
        settings=_settings(region.config),
        dump_dir=region.dump_dir,
        notes=_notes(region, runners),
        traffic=traffic_of(all_stats),
        captures=sum(stats.captures for stats in all_stats),
        capture_seconds=sum(stats.capture_seconds for stats in all_stats),
        alerts=tuple(dict.fromkeys(alert.message for stats in alive for alert in alerts(stats))),
        **_merged(all_stats),
    )


def _notes(region: Region, runners: Sequence[GraphRunner]) -> tuple[str, ...]:
    """Remarks on the region, on what it was to be split at, and on the sizes that its runners pad or do not."""
    of_runners = [note for each in runners for note in (*each.router.dims.notes, *each.padding.notes)]
    return tuple(dict.fromkeys([*region.notes, *remarks(region), *of_runners]))


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
        shared_mib=plan.shared_bytes / MIB,
    )


def _merged(all_stats: Sequence[RunnerStats]) -> dict[str, dict[str, Any]]:
    """The counters by name, added up over a region's runners."""
    live_calls: Counter[str] = Counter()
    moves: Counter[str] = Counter()
    bindings: dict[str, str] = {}
    for stats in all_stats:
        live_calls.update(stats.live_calls)
        moves.update(stats.moves)
        bindings.update(stats.bindings)
    return {"live_calls": dict(live_calls), "moves": dict(moves), "bindings": bindings}


def _settings(config: Config) -> tuple[SettingReport, ...]:
    return tuple(SettingReport(name, plain(value), origin) for name, value, origin in config.describe())
