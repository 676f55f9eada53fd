"""``graphcap.suggest_ladder()``: the ladder that fits what was seen, within a budget."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from graphcap.compiler.debug.report import RegionReport, Report
from graphcap.compiler.debug.snapshot import MIB
from graphcap.cudagraph.counters.suggest import Demand, Prices, Suggestion, best_rungs
from graphcap.cudagraph.counters.traffic import Traffic
from graphcap.cudagraph.dispatch.ladders import TOKENS
from graphcap.errors import ConfigError

#: What sizes can be read from: a report, or a histogram of sizes (``{7: 120, 8: 3000}``).
Seen = Report | RegionReport | Traffic | Mapping[int, int]


def suggest_ladder(
    seen: Seen,
    budget: int,
    *,
    dim: str | None = None,
    max_bytes: int | None = None,
    cover_up_to: int | None = None,
    max_padding_ratio: float | None = None,
    token_cost: float = 1.0,
    live_cost: float = math.inf,
    plan_cost: float = 0.0,
) -> Suggestion:
    """The ladder of one dim that would have cost least on the traffic seen so far. Exact, not a heuristic.

    Args:
        seen: ``graphcap.explain(model)``, one of its regions, its traffic, or a histogram ``{size: calls}``.
        budget: the most rungs, each of them a plan.
        dim: the named dim, where the traffic has several; ``"num_tokens"`` or the only one when not given.
        max_bytes: bytes of device memory for graphs. Lowers the budget: from them goes what the plans of the report
            share, and of the rest each plan takes what one of the report takes on average.
        cover_up_to: the largest size to serve. Larger ones are left live; the ladder reaches up to it even where it was
            not seen, as long as live_cost is infinite. The largest size seen when not given.
        max_padding_ratio: as in the configuration; when not given the report's, or 0.5 for a histogram.
        token_cost: what a token of padding costs, in a unit of your choice: microseconds, or padded tokens.
        live_cost: what running one call without a graph costs more than replaying it. Infinite: every size is covered.
        plan_cost: what one more plan costs (its capture, its memory) against the calls counted here.

    Returns:
        The ladder, its ``sizes`` ready for ``capture_sizes``, and what it would have cost on this traffic.

    Raises:
        ConfigError: nothing was counted; the dim cannot be told; the budget does not cover every size and
            live_cost does not say what leaving one out costs.
    """
    traffic = list(_traffic(seen))
    name = _dim(traffic) if dim is None else dim
    demands = _demands(traffic, name)
    if not demands:
        raise ConfigError(f"suggest_ladder: no calls with a size of {name!r} were counted")
    if cover_up_to is not None:
        demands = {n: each for n, each in demands.items() if n <= cover_up_to}
        demands.setdefault(cover_up_to, Demand(cover_up_to, 0, 0))
    if max_bytes is not None:
        budget = min(budget, _affordable(seen, max_bytes))
    ratio = _max_padding_ratio(seen) if max_padding_ratio is None else max_padding_ratio
    prices = Prices(token=token_cost, live=live_cost, plan=plan_cost)
    return best_rungs(list(demands.values()), budget, ratio, prices)


def _regions(seen: Seen) -> Sequence[RegionReport]:
    if isinstance(seen, Report):
        return seen.regions
    return [seen] if isinstance(seen, RegionReport) else []


def _traffic(seen: Seen) -> Iterator[Traffic | Mapping[int, int]]:
    if isinstance(seen, (Traffic, Mapping)):
        yield seen
    else:
        yield from (region.traffic for region in _regions(seen))


def _dim(traffic: Sequence[Traffic | Mapping[int, int]]) -> str:
    names = list(dict.fromkeys(name for each in traffic if isinstance(each, Traffic) for name in each.names))
    if TOKENS in names or not names:
        return TOKENS
    if len(names) > 1:
        raise ConfigError(f"suggest_ladder: say which dim, dim= one of {', '.join(names)}")
    return names[0]


def _demands(traffic: Sequence[Traffic | Mapping[int, int]], name: str) -> dict[int, Demand]:
    """Per size of the dim what was asked for. Where dims multiply to tokens, the others weigh the padding."""
    found: dict[int, Demand] = {}
    for each in traffic:
        if isinstance(each, Traffic) and name not in each.names:
            continue
        at = each.names.index(name) if isinstance(each, Traffic) else 0
        histogram = each.histogram() if isinstance(each, Traffic) else {(n,): calls for n, calls in each.items()}
        for size, calls in histogram.items():
            if size[at] < 1:
                continue  # no ladder has a rung for an empty batch
            before = found.get(size[at], Demand(size[at], 0, 0))
            others = 1 if isinstance(each, Traffic) and TOKENS in each.names else math.prod(size[:at] + size[at + 1 :])
            found[size[at]] = Demand(size[at], before.calls + calls, before.rows + calls * others)
    return found


def _affordable(seen: Seen, max_bytes: int) -> int:
    """How many plans like those of a report fit."""
    plans = [plan for region in _regions(seen) for plan in region.plans]
    shared = sum(plan.shared_mib for plan in plans)
    own = sum(plan.mib for plan in plans) - shared
    if own <= 0:
        raise ConfigError("suggest_ladder: max_bytes needs a report with captured plans, to know what a plan takes")
    return max(0, int((max_bytes / MIB - shared) // (own / len(plans))))


def _max_padding_ratio(seen: Seen) -> float:
    ratios = [row.value for region in _regions(seen) for row in region.settings if row.name == "max_padding_ratio"]
    return min(ratios, default=0.5)
