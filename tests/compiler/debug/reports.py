"""Reports made by hand."""

from __future__ import annotations

import dataclasses

from graphcap.compiler.debug.report import PlanReport, RegionReport
from graphcap.cudagraph.counters.stats import RunnerStats
from graphcap.cudagraph.counters.traffic import Traffic, traffic_of


def region(name: str, **fields: object) -> RegionReport:
    """A region about which nothing is known but the fields given."""
    empty = {"str": "", "float": 0.0, "int": 0}
    values = {
        each.name: empty.get(str(each.type), {} if str(each.type).startswith("dict") else ())
        for each in dataclasses.fields(RegionReport)
        if each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
    }
    return RegionReport(**values | {"name": name} | fields)


def plan(size: int, mib: float, replays: int = 0) -> PlanReport:
    return PlanReport((size,), "FULL", 1, (), {}, mib, 0.5, replays)


def traffic(served: dict[tuple[int, ...], tuple[tuple[int, ...] | None, int]], *names: str) -> Traffic:
    """Of size -> (rung, calls); without a rung the calls were live."""
    stats = RunnerStats(dim_names=names or ("num_tokens",))
    for size, (rung, calls) in served.items():
        counter = stats.of_size(size, rung)
        if rung is None:
            counter.live = calls
        else:
            counter.replays = calls
    return traffic_of([stats])
