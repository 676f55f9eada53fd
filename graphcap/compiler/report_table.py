"""A report as plain text: at most 110 columns, no dependency, readable by somebody who has never seen one."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graphcap.compiler.report import PieceReport, PlanReport, RegionReport, Report

WIDTH = 110
_LABEL = 14  # columns of the names on the left
_SHOWN_TWINS = 3
_SHOWN_PLANS = 12
_SHOWN_NAMES = 6


def table(report: Report) -> str:
    """The whole report."""
    regions = report.regions
    if not regions:
        return textwrap.fill(f"graphcap: {report.message}", WIDTH)
    lines = [f"graphcap report for {report.target}: {_count(len(regions), 'region')}"]
    for note in report.notes:
        lines += _row("note", note)
    for region in regions:
        lines += ["", *_region(region)]
    return "\n".join(lines)


def _region(region: RegionReport) -> Iterator[str]:
    yield from _wrap(f"{region.name}, graph {region.compile_id}: {_summary(region)}", "", "  ")
    yield from _row("traced", f"{region.function} ({region.location})")
    if region.recompiled_because:
        yield from _row("recompiled", f"this guard failed: {region.recompiled_because}")
    if region.bypass:
        yield from _row("bypassed", f"nothing of graphcap runs here: {region.bypass}")
    if region.pieces:
        yield from _piece_table(region.pieces)
        yield from _fusions(region.pieces)
        yield from _sizes(region)
        yield from _graphs(region)
    chosen = [f"{each.name}={each.value} ({each.origin})" for each in region.settings if each.origin != "default"]
    yield from _row("settings", ", ".join(chosen) or "all at their defaults")
    if region.dump_dir:
        yield from _row("dump", region.dump_dir)
    for note in region.notes:
        yield from _row("note", note)


_ORIGINS = {
    "compiled": "compiled",
    "cache": "from the cache",
    "eager": "not compiled",
    "failed": "could not be compiled",
}


def _summary(region: RegionReport) -> str:
    if not region.pieces:
        return "not split"
    distinct = [piece for piece in region.pieces if not piece.twin_of]
    origins = Counter(piece.origin for piece in distinct)
    seconds = {origin: sum(p.seconds for p in distinct if p.origin == origin) for origin in origins}
    parts = []
    for origin, text in _ORIGINS.items():
        if origins[origin]:
            parts.append(f"{origins[origin]} {text}" + (f" in {seconds[origin]:.2f} s" if seconds[origin] else ""))
    made = f"{_count(len(region.pieces), 'piece')}, {len(distinct)} distinct ({', '.join(parts)})"
    return f"{made}; ready after {region.seconds:.2f} s"


# -- pieces ------------------------------------------------------------------------------------------------------------


def _piece_table(pieces: Sequence[PieceReport]) -> Iterator[str]:
    yield f"  {'piece':<26} {'how it runs':<19} {'ops':>5}  {'code':<16} where"
    for piece in pieces:
        if piece.twin_of:
            continue
        twins = [other.name for other in pieces if other.twin_of == piece.name]
        code = f"{piece.origin} {piece.seconds:.2f} s" if piece.seconds else _CODE.get(piece.origin, piece.origin)
        start = f"{_names(piece.name, twins):<26} {how_it_runs(piece):<19} {piece.num_nodes:>5}  {code:<16} "
        yield from _wrap(start + _where(piece), "  ", " " * 8)
        for label, text in (("why", piece.reason), ("writes", ", ".join(piece.mutates)), ("note", piece.note)):
            if text:
                yield from _wrap(f"{label}: {text}", " " * 8, " " * 10)


_CODE = {"eager": "as it is", "failed": "as it is (failed)"}


def how_it_runs(piece: PieceReport) -> str:
    """``"captured"``, ``"captured in FULL"``, ``"live, compiled"`` or ``"live"``."""
    if piece.capture == "always":
        return "captured"
    if piece.capture == "full":
        return "captured in FULL"
    return "live, compiled" if piece.kind == "compiled" else "live"


def _names(name: str, twins: Sequence[str]) -> str:
    """``"piece_2, 4, 6, ... (x30)"``: a piece and its twins."""
    if not twins:
        return name
    numbers = [twin.rpartition("_")[2] for twin in twins]
    shown = numbers[: _SHOWN_TWINS - 1] + (["..."] if len(numbers) >= _SHOWN_TWINS else [])
    return f"{', '.join([name, *shown])} (x{len(twins) + 1})"


def _where(piece: PieceReport) -> str:
    source = _short(piece.source)
    return f"{piece.module_path} ({source})" if piece.module_path and source else piece.module_path or source or "-"


def _short(source: str) -> str:
    """``"modeling_llama.py:72"`` of a path; the report's ``to_dict()`` has the whole one."""
    return PurePath(source).name


def _fusions(pieces: Sequence[PieceReport]) -> Iterator[str]:
    for piece in pieces:
        for fusion in piece.fusions:
            times = f" x{fusion.count}" if fusion.count > 1 else ""
            what = f"{_count(fusion.matches, 'match', 'matches')}{times} in {piece.name}, {fusion.replaced} rewritten"
            left = "" if fusion.replaced == fusion.matches else "; what was not rewritten is left to Inductor"
            when = "; places as of its compilation" if piece.origin == "cache" else ""
            yield from _row("fusion", f"{fusion.name}: {what}{left}{when}")
            for site in fusion.sites:
                yield from _wrap(_short_site(site), " " * (_LABEL + 4), " " * (_LABEL + 6))
            if fusion.error:
                yield from _wrap(f"failed: {fusion.error}", " " * (_LABEL + 4), " " * (_LABEL + 6))


def _short_site(site: str) -> str:
    source, blank, rest = site.partition(" ")
    return f"{_short(source)}{blank}{rest}"


# -- sizes and graphs --------------------------------------------------------------------------------------------------


def _sizes(region: RegionReport) -> Iterator[str]:
    if region.key_sizes:
        in_key = ", ".join(f"{symbol} = {carrier}" for symbol, carrier in region.key_sizes.items())
        yield from _row("sizes", f"in the graph key: {in_key}")
    for symbol, reason in region.live_sizes.items():
        yield from _row("sizes", f"outside the graph key: {symbol}, as {reason}")


def _graphs(region: RegionReport) -> Iterator[str]:
    if region.no_capture:
        yield from _row("graphs", f"none are captured: {region.no_capture}")
        return
    plans = region.plans
    mib = sum(plan.mib for plan in plans)
    counts = f"{_count(len(plans), 'captured shape')}, {mib:.1f} MiB, {_count(region.replays, 'replay')}"
    extra = [f"{n} {word}" for n, word in ((region.recaptures, "recaptured"), (region.evictions, "dropped")) if n]
    yield from _row("graphs", ", ".join([counts, *extra]))
    if plans:
        yield from _plan_table(plans)
    for reason, calls in sorted(region.live_calls.items(), key=lambda item: -item[1]):
        yield from _row("without graph", f"{_count(calls, 'call')}: {reason}")
    for failure in region.failures:
        yield from _row("failed", f"a capture: {failure}")
    yield from _inputs(region)


def _plan_table(plans: Sequence[PlanReport]) -> Iterator[str]:
    left = " " * (_LABEL + 4)
    yield f"{left}{'key':<22} {'mode':<10} {'segments':>8} {'MiB':>8} {'capture s':>10} {'replays':>8}  live"
    for plan in sorted(plans, key=lambda plan: -plan.replays)[:_SHOWN_PLANS]:
        key = ", ".join(map(str, plan.key)) or "one shape"
        numbers = f"{plan.num_segments:>8} {plan.mib:>8.1f} {plan.seconds:>10.2f} {plan.replays:>8}"
        live = _count(len(plan.live), "piece") if plan.live else "-"
        yield from _wrap(f"{key:<22} {plan.mode:<10} {numbers}  {live}", left, left + "  ")
        reasons = Counter(plan.live.values())
        for reason, count in reasons.items():
            yield from _wrap(f"live: {reason}" + (f" (x{count})" if count > 1 else ""), left + "  ", left + "    ")
    if len(plans) > _SHOWN_PLANS:
        yield f"{left}... and {len(plans) - _SHOWN_PLANS} more"


def _inputs(region: RegionReport) -> Iterator[str]:
    by_binding: dict[str, list[str]] = {}
    for name, binding in region.bindings.items():
        by_binding.setdefault(binding, []).append(name)
    for binding, names in by_binding.items():
        shown = ", ".join(names[:_SHOWN_NAMES]) + (", ..." if len(names) > _SHOWN_NAMES else "")
        yield from _row("inputs", f"{len(names)} {binding}: {shown}")
    for name, times in region.moves.items():
        yield from _row("moved", f"the address of {name}, {_count(times, 'time')}")


# -- text --------------------------------------------------------------------------------------------------------------


def _row(label: str, text: str) -> Iterator[str]:
    return _wrap(f"{label:<{_LABEL}}{text}", "  ", " " * (_LABEL + 2))


def _wrap(text: str, first: str, later: str) -> Iterator[str]:
    """Lines of at most :data:`WIDTH` columns; runs of blanks within a line survive, as they align columns."""
    yield from textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=later, drop_whitespace=True, break_on_hyphens=False
    )


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
