"""``report.metrics()``: totals, regions and details, under names that Prometheus accepts."""

from __future__ import annotations

import re

from graphcap.compiler.debug import metrics
from graphcap.compiler.debug.report import Report
from tests.compiler.debug.reports import plan, region, traffic

DECODE = region(
    "forward_0",
    replays=9,
    live_calls={"warm-up": 2, 'odd "strides"\\\n': 1},
    captures=3,
    capture_seconds=1.5,
    failures=("piece_1: no",),
    recaptures=1,
    evictions=2,
    plans=(plan(4, 1.5), plan(8, 0.5)),
    traffic=traffic({(3,): ((4,), 6), (5,): ((8,), 3), (99,): (None, 1)}),
)
ENCODE = region(
    "forward_1", replays=1, live_calls={"warm-up": 2}, traffic=traffic({(3, 90): ((4, 100), 1)}, "batch", "seq")
)
FOUND = Report("model", (DECODE, ENCODE)).metrics()


def test_totals_are_the_sums_over_regions() -> None:
    assert FOUND["graphcap_regions"] == 2
    assert FOUND["graphcap_replays_total"] == 10
    assert FOUND["graphcap_live_calls_total"] == 5
    assert FOUND["graphcap_tokens_total"] == 18 + 15 + 270
    assert FOUND["graphcap_padded_tokens_total"] == 6 + 9 + 130
    assert FOUND["graphcap_padding_waste_ratio"] == 145 / (145 + 303)
    assert FOUND["graphcap_uncovered_calls_total"] == 1
    assert FOUND["graphcap_captures_total"] == 3
    assert FOUND["graphcap_capture_seconds_total"] == 1.5
    assert FOUND["graphcap_capture_failures_total"] == 1
    assert FOUND["graphcap_recaptures_total"] == 1
    assert FOUND["graphcap_evictions_total"] == 2
    assert FOUND["graphcap_plans"] == 2
    assert FOUND["graphcap_graph_mib"] == 2.0


def test_regions_and_details_carry_labels() -> None:
    assert FOUND['graphcap_region_replays_total{region="forward_0"}'] == 9
    assert FOUND['graphcap_region_padded_tokens_total{region="forward_1"}'] == 130
    assert FOUND['graphcap_rung_replays_total{region="forward_0",rung="8"}'] == 3
    assert FOUND['graphcap_rung_replays_total{region="forward_1",rung="4x100"}'] == 1
    assert FOUND['graphcap_live_calls_by_reason_total{region="forward_0",reason="warm-up"}'] == 2
    assert FOUND[r'graphcap_live_calls_by_reason_total{region="forward_0",reason="odd \"strides\"\\\n"}'] == 1


def test_every_line_is_an_exposition_of_a_number() -> None:
    label = r'\w+="(?:[^"\\\n]|\\[\\"n])*"'
    for key, value in FOUND.items():
        assert re.fullmatch(rf"[a-z_]+(\{{{label}(,{label})*\}})?", key), key
        assert type(value) in (int, float)


def test_an_empty_report_has_the_same_totals() -> None:
    empty = Report("nothing", ()).metrics()
    assert set(empty) == {key for key in FOUND if "{" not in key}
    assert set(empty.values()) == {0}


def test_every_name_is_documented() -> None:
    documented = set(re.findall(r"``(graphcap_[a-z_]+)", metrics.__doc__ or ""))
    assert {key for key in FOUND if "{" not in key} <= documented
    assert {key.partition("{")[0] for key in FOUND if "region_" not in key} <= documented
