"""A report as plain text: at most 110 columns, no dependency, readable by somebody who has never seen one."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING

from graphcap.compiler.debug.rows import LABEL, WIDTH, count, duration, row, some, wrap

if TYPE_CHECKING:
    from graphcap.compiler.debug.report import PieceReport, PlanReport, RegionReport, Report
    from graphcap.cudagraph.counters.traffic import Traffic

_SHOWN_TWINS = 3
_SHOWN_PLANS = 12
_SHOWN_SIZES = 2
_SHOWN_GUARDS = 5


def table(report: Report) -> str:
    """The whole report."""
    regions = report.regions
    if not regions:
        return textwrap.fill(f"graphcap: {report.message}", WIDTH)
    lines = [f"graphcap report for {report.target}: {count(len(regions), 'region')}"]
    for note in report.notes:
        lines += row("note", note)
    lines += _unchecked(report.unchecked_guards)
    for region in regions:
        lines += ["", *_region(region)]
    return "\n".join(lines)


def _unchecked(guards: Sequence[str]) -> Iterator[str]:
    if guards:
        yield from row("sealed", f"{count(len(guards), 'guard')} are not evaluated on every call:")
        for guard in guards[:_SHOWN_GUARDS]:
            yield from wrap(guard.split(" # ")[0], " " * 16, " " * 18)
        if len(guards) > _SHOWN_GUARDS:
            yield f"{'':16}and {len(guards) - _SHOWN_GUARDS} more in report.unchecked_guards"


def _region(region: RegionReport) -> Iterator[str]:
    yield from wrap(f"{region.name}, graph {region.compile_id}: {_summary(region)}", "", "  ")
    yield from row("traced", f"{region.function} ({region.location})")
    if region.recompiled_because:
        yield from row("recompiled", f"this guard failed: {region.recompiled_because}")
    if region.bypass:
        yield from row("bypassed", f"nothing of graphcap runs here: {region.bypass}")
    if region.pieces:
        yield from _piece_table(region.pieces)
        yield from _legend(region.pieces)
        yield from _fusions(region.pieces)
        yield from _sizes(region)
        yield from _graphs(region)
    chosen = [f"{each.name}={each.value} ({each.origin})" for each in region.settings if each.origin != "default"]
    yield from row("settings", ", ".join(chosen) or "all at their defaults")
    if region.dump_dir:
        yield from row("dump", region.dump_dir)
    for note in region.notes:
        yield from row("note", note)


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
            parts.append(f"{origins[origin]} {text}" + (f" in {duration(seconds[origin])}" if seconds[origin] else ""))
    made = f"{count(len(region.pieces), 'piece')}, {len(distinct)} distinct ({', '.join(parts)})"
    return f"{made}; ready after {duration(region.seconds)}"


# -- pieces ------------------------------------------------------------------------------------------------------------


def _piece_table(pieces: Sequence[PieceReport]) -> Iterator[str]:
    yield f"  {'piece':<23} {'how it runs':<14} {'ops':>4}  {'code':<15} where"
    for piece in pieces:
        if piece.twin_of:
            continue
        twins = [other.name for other in pieces if other.twin_of == piece.name]
        code = f"{piece.origin} {duration(piece.seconds)}" if piece.seconds else _CODE.get(piece.origin, piece.origin)
        start = f"{_names(piece.name, twins):<23} {how_it_runs(piece):<14} {piece.num_nodes:>4}  {code:<15} "
        yield from wrap(start + _where(piece), "  ", " " * 8)
        note = "" if piece.note in _ORDINARY_NOTES else piece.note
        for label, text in (("why", piece.reason), ("writes", some(piece.mutates)), ("note", note)):
            if text:
                yield from wrap(f"{label}: {text}", " " * 8, " " * 10)


def _legend(pieces: Sequence[PieceReport]) -> Iterator[str]:
    if any(piece.capture == "full" for piece in pieces):
        yield from wrap("FULL only: part of the graph in a FULL plan, live in a PIECEWISE one", " " * 8, " " * 10)
    if any(piece.capture in _UNIFORM for piece in pieces):
        kinds = "whose requests all bring as many tokens, or one"
        text = f"uniform only, 1-token only: part of the graph in a FULL plan for batches {kinds}; live elsewhere"
        yield from wrap(text, " " * 8, " " * 10)


_UNIFORM = {"uniform_batch": "uniform only", "uniform_single_token": "1-token only"}
_CODE = {"eager": "as it is", "failed": "as it is"}
_ORDINARY_NOTES = {"cache miss: absent", "cache off"}


def how_it_runs(piece: PieceReport) -> str:
    """``"captured"``, ``"FULL only"`` (captured in FULL, else live), ``"uniform only"`` (captured in FULL where every
    request brings as many tokens, or one), ``"live, compiled"`` or ``"live"``."""
    if piece.capture == "always":
        return "captured"
    if piece.capture == "full":
        return "FULL only"
    if piece.capture in _UNIFORM:
        return _UNIFORM[piece.capture]
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
            what = f"{count(fusion.matches, 'match', 'matches')}{times} in {piece.name}, {fusion.replaced} rewritten"
            left = "" if fusion.replaced == fusion.matches else "; what was not rewritten is left to Inductor"
            when = "; places as of its compilation" if piece.origin == "cache" else ""
            yield from row("fusion", f"{fusion.name}: {what}{left}{when}")
            for site in fusion.sites:
                yield from wrap(_short_site(site), " " * (LABEL + 4), " " * (LABEL + 6))
            if fusion.error:
                yield from wrap(f"failed: {fusion.error}", " " * (LABEL + 4), " " * (LABEL + 6))


def _short_site(site: str) -> str:
    source, blank, rest = site.partition(" ")
    return f"{_short(source)}{blank}{rest}"


# -- sizes and graphs --------------------------------------------------------------------------------------------------


def _sizes(region: RegionReport) -> Iterator[str]:
    if region.key_sizes:
        in_key = ", ".join(f"{symbol} = {carrier}" for symbol, carrier in region.key_sizes.items())
        yield from row("sizes", f"in the graph key: {in_key}")
    live = list(region.live_sizes.items())
    for symbol, reason in live[:_SHOWN_SIZES]:
        yield from row("sizes", f"outside the graph key: {symbol}, as {reason}")
    if len(live) > _SHOWN_SIZES:
        others = some([symbol for symbol, _ in live[_SHOWN_SIZES:]])
        yield from row("sizes", f"outside the graph key for such reasons too: {others}")


def _graphs(region: RegionReport) -> Iterator[str]:
    if region.no_capture:
        yield from row("graphs", f"none are captured: {region.no_capture}")
        return
    if region.device == "simulated":
        yield from row("graphs", "on the simulated device: a test of the logic, it says nothing about speed or memory")
    plans = region.plans
    mib = sum(plan.mib for plan in plans)
    shared = sum(plan.shared_mib for plan in plans)
    memory = f"{mib:.1f} MiB" + (f" ({mib - shared:.1f} of it the graphs alone)" if shared >= 0.05 else "")
    counts = f"{count(len(plans), 'captured shape')}, {memory}, {count(region.replays, 'replay')}"
    extra = [f"{n} {word}" for n, word in ((region.recaptures, "recaptured"), (region.evictions, "dropped")) if n]
    yield from row("graphs", ", ".join([counts, *extra]))
    if plans:
        yield from _plan_table(plans)
        yield from _unexpectedly_live(region)
        yield from _outputs(region)
    yield from _traffic(region.traffic)
    for reason, calls in sorted(region.live_calls.items(), key=lambda item: -item[1]):
        yield from row("without graph", f"{count(calls, 'call')}: {reason}")
    for failure in region.failures:
        yield from row("failed", f"a capture: {failure}")
    for alert in region.alerts:
        yield from row("alert", alert)
    for divergence in region.divergences:
        yield from row("diverged", divergence)
    for name, reason in region.unchecked.items():
        yield from row("unchecked", f"{name} was not compared with a live run: {reason}")
    yield from _inputs(region)


def _plan_table(plans: Sequence[PlanReport]) -> Iterator[str]:
    left = " " * (LABEL + 4)
    yield f"{left}{'key':<22} {'mode':<10} {'segments':>8} {'MiB':>8} {'capture s':>10} {'replays':>8}  live"
    for plan in sorted(plans, key=lambda plan: -plan.replays)[:_SHOWN_PLANS]:
        key = ", ".join(map(str, plan.key)) or "one shape"
        numbers = f"{plan.num_segments:>8} {plan.mib:>8.1f} {plan.seconds:>10.2f} {plan.replays:>8}"
        live = count(len(plan.live), "piece") if plan.live else "-"
        yield from wrap(f"{key:<22} {plan.mode:<10} {numbers}  {live}", left, left + "  ")
    if len(plans) > _SHOWN_PLANS:
        yield f"{left}... and {len(plans) - _SHOWN_PLANS} more"


def _traffic(traffic: Traffic) -> Iterator[str]:
    hits = sorted(traffic.hits().items(), key=lambda item: -item[1])
    if hits:
        shown = [f"{_size(rung)}: {replays}" for rung, replays in hits[:_SHOWN_PLANS]]
        left = [f"and {len(hits) - _SHOWN_PLANS} more"] if len(hits) > _SHOWN_PLANS else []
        yield from row("rungs", f"replays by rung of {', '.join(traffic.names)}: {', '.join(shown + left)}")
        waste = f"{traffic.padded_tokens} of {traffic.tokens + traffic.padded_tokens} tokens in replays"
        yield from row("padding", f"{waste} ({traffic.padding_waste:.1%})")
    uncovered = traffic.uncovered()
    if uncovered:
        sizes = some([_size(size) for size in uncovered])
        yield from row("uncovered", f"no rung for {sizes}: {count(sum(uncovered.values()), 'call')}")


def _size(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))


def _unexpectedly_live(region: RegionReport) -> Iterator[str]:
    """Pieces that could have been captured and run live in some plan; why the others do is said with the pieces."""
    capturable = {piece.name for piece in region.pieces if piece.capture == "always"}
    reasons = {(name, why): None for plan in region.plans for name, why in plan.live.items() if name in capturable}
    for reason, pieces in _grouped(reasons).items():
        yield from row("runs live", f"{some(pieces)}: {reason}")


def _outputs(region: RegionReport) -> Iterator[str]:
    """How long what a replay returns lasts, where that is not for ever."""
    policy = next((str(each.value) for each in region.settings if each.name == "outputs"), "clone")
    kind, _, count = policy.partition(":")
    if kind == "static":
        yield from row("outputs", "static: the graph's own memory, valid until the next replay of the same shape")
    elif kind == "ring":
        yield from row("outputs", f"{policy}: copies, overwritten by later replay number {count} of the same shape")


def _grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for name, reason in pairs:
        grouped.setdefault(reason, []).append(name)
    return grouped


def _inputs(region: RegionReport) -> Iterator[str]:
    for binding, names in _grouped(region.bindings.items()).items():
        yield from row("inputs", f"{len(names)} {binding}: {some(names)}")
    for name, times in region.moves.items():
        yield from row("moved", f"the address of {name}, {count(times, 'time')}")
