"""The counters of a report as one flat dict of numbers.

A key is a metric name of Prometheus with its labels. ``"\\n".join(f"{key} {value}" for key, value in ...)`` is a valid
text exposition. Names that end in ``_total`` only grow while no region goes away, the others are gauges.

For the whole report, without labels:

| name | meaning |
|---|---|
| ``graphcap_regions`` | graphs that Dynamo handed over |
| ``graphcap_replays_total`` | calls that a plan served |
| ``graphcap_live_calls_total`` | calls without a graph, warm-ups included |
| ``graphcap_tokens_total`` | tokens that callers brought to replays |
| ``graphcap_padded_tokens_total`` | tokens that replays computed for nobody |
| ``graphcap_uncovered_calls_total`` | calls of a size that no rung of the ladder serves |
| ``graphcap_captures_total`` | plans captured |
| ``graphcap_capture_seconds_total`` | time their capturing calls took |
| ``graphcap_capture_failures_total`` | captures that failed |
| ``graphcap_recaptures_total`` | plans captured again because an address had moved |
| ``graphcap_evictions_total`` | plans dropped |
| ``graphcap_plans`` | plans that can be replayed now |
| ``graphcap_graph_mib`` | growth of device memory by these plans, MiB |
| ``graphcap_padding_waste_ratio`` | padded tokens over all tokens of replays, 0 to below 1 |

The same for each region as ``graphcap_region_...{region="forward_0"}``, and in detail:
``graphcap_rung_replays_total{region=,rung="8"}`` (``rung="4x128"`` where there are several dims) and
``graphcap_live_calls_by_reason_total{region=,reason=}``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graphcap.compiler.debug.report import RegionReport

Number = int | float


def metrics_of(regions: Sequence[RegionReport]) -> dict[str, Number]:
    """The metrics of the module docstring."""
    found: dict[str, Number] = {"graphcap_regions": len(regions)}
    found |= {f"graphcap_{name}": value for name, value in _counted(regions).items()}
    for region in regions:
        for name, value in _counted([region]).items():
            found[_labelled(f"graphcap_region_{name}", region=region.name)] = value
        for rung, replays in region.traffic.hits().items():
            shown = "x".join(map(str, rung))
            found[_labelled("graphcap_rung_replays_total", region=region.name, rung=shown)] = replays
        for reason, calls in region.live_calls.items():
            found[_labelled("graphcap_live_calls_by_reason_total", region=region.name, reason=reason)] = calls
    return found


def _counted(regions: Sequence[RegionReport]) -> dict[str, Number]:
    """What regions have counted together."""
    traffics = [region.traffic for region in regions]
    tokens, padded = sum(each.tokens for each in traffics), sum(each.padded_tokens for each in traffics)
    return {
        "replays_total": sum(region.replays for region in regions),
        "live_calls_total": sum(sum(region.live_calls.values()) for region in regions),
        "tokens_total": tokens,
        "padded_tokens_total": padded,
        "uncovered_calls_total": sum(sum(each.uncovered().values()) for each in traffics),
        "captures_total": sum(region.captures for region in regions),
        "capture_seconds_total": sum(region.capture_seconds for region in regions),
        "capture_failures_total": sum(len(region.failures) for region in regions),
        "recaptures_total": sum(region.recaptures for region in regions),
        "evictions_total": sum(region.evictions for region in regions),
        "plans": sum(len(region.plans) for region in regions),
        "graph_mib": sum(plan.mib for region in regions for plan in region.plans),
        "padding_waste_ratio": padded / (tokens + padded) if padded else 0.0,
    }


def _labelled(name: str, **labels: str) -> str:
    shown = ",".join(f'{label}="{_escaped(value)}"' for label, value in labels.items())
    return f"{name}{{{shown}}}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
