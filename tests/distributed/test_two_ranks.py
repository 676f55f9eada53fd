"""Two ranks over gloo, on simulated devices: whatever happens to one of them, both run the same collectives.

Field-notes row 275: other systems let each rank decide alone, and hang when one of them warms up, proves or captures
while another replays. In every scenario the model sums over the ranks, so that a rank that is out of step gets a wrong
sum, or none. Both run in the same two processes, see ``scenarios.py``.
"""

from __future__ import annotations

from typing import Any

import pytest

from graphcap.cudagraph.hardware.account import RECENT_USES
from tests.distributed.scenarios import ALL
from tests.distributed.two_ranks import run_on_two_ranks


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return run_on_two_ranks(ALL, tmp_path_factory.mktemp("two_ranks"))


class Both:
    """What a scenario left on both ranks, which is the same but for what is looked at one by one."""

    def __init__(self, results: dict[str, list[Any]], name: str) -> None:
        self.ranks = results[name]
        for each in self.ranks:
            assert isinstance(each, dict), each
            assert each["right"], each
        assert self["sums"], "the ranks have nothing in common"

    def __getitem__(self, name: str) -> Any:
        first, second = (each[name] for each in self.ranks)
        assert first == second, name
        return first

    def captured(self) -> dict[tuple[int, ...], list[str]]:
        return dict(self["plans"])


def test_same_plans_after_the_same_calls(results: dict[str, list[Any]]) -> None:
    both = Both(results, "same_plans")
    assert list(both.captured()) == [(3,), (5,)]
    assert both["replays"] == 4
    assert len(both["sums"]) == 2 * 10, "each collective ran once in each call"


def test_collectives_inside_of_graphs(results: dict[str, list[Any]]) -> None:
    both = Both(results, "collectives_in_graphs")
    assert both.captured() == {(3,): ["step_0", "step_1", "step_2", "step_3", "step_4"]}
    assert both["replays"] == 3


@pytest.mark.parametrize(
    ("scenario", "step", "left"),
    [
        ("failure_in_the_first_segment", "step_0", ["step_2", "step_4"]),
        ("failure_in_the_middle", "step_2", ["step_0", "step_4"]),
        ("failure_in_the_last_segment", "step_4", ["step_0", "step_2"]),
    ],
)
def test_capture_that_fails_on_one_rank_is_given_up_by_both(
    results: dict[str, list[Any]], scenario: str, step: str, left: list[str]
) -> None:
    both = Both(results, scenario)
    (failure,) = both["failures"]
    assert failure.startswith(f"{step}: rank 1: SimulatedCaptureError")
    assert both.captured() == {(3,): left}, "the step runs live on both"
    assert len(both["sums"]) == 2 * 8
    assert both["replays"] == 4


def test_a_sum_is_in_a_graph_on_all_ranks_or_on_none(results: dict[str, list[Any]]) -> None:
    """NCCL asks for that, of every launch."""
    both = Both(results, "sums_before_a_failure")
    assert both["ways"] == [
        ["live", "live"],
        ["live", "live"],
        ["recorded", "graph", "recorded", "live"],  # one has failed in the second segment, which both give up
        ["recorded", "graph", "recorded", "graph"],
        ["graph", "graph"],
    ]


def test_no_room_on_one_rank_is_no_room_on_both(results: dict[str, list[Any]]) -> None:
    both = Both(results, "no_room_on_one_rank")
    assert both.captured() == {}
    roomy, full = (list(each["reasons"]) for each in both.ranks)
    assert any(reason.startswith("rank 1: no room: max_graph_bytes=1,") for reason in roomy)
    assert any(reason.startswith("no room: max_graph_bytes=1,") for reason in full)


def test_out_of_memory_on_one_rank_is_tried_again_by_both(results: dict[str, list[Any]]) -> None:
    both = Both(results, "out_of_memory_on_one_rank")
    assert both.captured() == {}
    assert len(both["failures"]) == 2
    assert all(reason.startswith("rank 1: OutOfMemoryError") for reason in both["failures"])


def test_plan_that_gives_way_on_one_rank_gives_way_on_both(results: dict[str, list[Any]]) -> None:
    both = Both(results, "eviction_on_one_rank")
    assert list(both.captured()) == [(24,), (20,)]
    assert both["evictions"] == 1


def test_whatever_happens_to_each_rank_both_keep_step(results: dict[str, list[Any]]) -> None:
    first, second = results["misfortunes"]
    assert isinstance(first, list), first
    assert isinstance(second, list), second
    for one, other in zip(first, second, strict=True):
        assert one["right"]
        assert other["right"]
        for name in ("sums", "plans", "replays", "failures", "evictions"):
            assert one[name] == other[name], name
    assert any(each["failures"] for each in first)
    assert any(each["evictions"] for each in first)
    assert any(each["replays"] > RECENT_USES for each in first)


def test_what_runs_live_on_one_rank_runs_live_on_both(results: dict[str, list[Any]]) -> None:
    both = Both(results, "live_on_one_rank")
    assert both.captured() == {(): ["step_1", "step_3"]}
    assert both["replays"] == 3


def test_different_sizes_by_one_decision(results: dict[str, list[Any]]) -> None:
    """Two calls at the size of the rung on both ranks, the proof when one of them is smaller, then replays."""
    both = Both(results, "different_sizes")
    assert both["refused"] == {}
    assert list(both.captured()) == [(8,), (4,)]
    assert both["replays"] >= 6


def test_rank_with_nothing_to_prove_takes_part_in_the_proof(results: dict[str, list[Any]]) -> None:
    both = Both(results, "different_sizes_at_once")
    assert both["refused"] == {}
    assert list(both.captured()) == [(8,)]
    assert both["replays"] == 5
    assert len(both["sums"]) > 8, "a proof runs the call several times"


def test_padding_that_is_wrong_on_one_rank_is_refused_on_both(results: dict[str, list[Any]]) -> None:
    both = Both(results, "padding_refused_on_one_rank")
    fine, wrong = (each["refused"]["n"] for each in both.ranks)
    assert fine == f"rank 1: {wrong}"
    assert "depends on the padded size" in wrong or "mixes rows" in wrong
    assert list(both.captured()) == [(5,)], "exact sizes, where both ranks have the same"


def test_sizes_that_nobody_agreed_on_are_an_error_and_no_hang(results: dict[str, list[Any]]) -> None:
    for error in results["without_a_common_decision"]:
        assert "the ranks are out of step" in error
        assert "rank 0: region: may it be captured, PIECEWISE (4,); rank 1" in error
        assert "step(dispatch=...)" in error


def test_weights_that_move_on_both_ranks_are_captured_anew(results: dict[str, list[Any]]) -> None:
    both = Both(results, "weights_moved_on_both_ranks")
    assert both["recaptures"] == 1
    assert both["replays"] == 8


def test_weight_that_moves_on_one_rank_is_an_error_there(results: dict[str, list[Any]]) -> None:
    (still, replayed), (moved, replayed_too) = results["weight_moved_on_one_rank"]
    assert replayed
    assert replayed_too
    assert still == ""
    assert "an input does not fit the plan" in moved
    assert "must move on all ranks or on none" in moved


def test_replays_ask_nobody(results: dict[str, list[Any]]) -> None:
    for until_captured, afterwards in results["replays_say_nothing"]:
        assert until_captured > 0
        assert afterwards == 0


def test_compiled_model_is_released_by_all_ranks_or_not_at_all(results: dict[str, list[Any]]) -> None:
    for each in results["compiled_and_released"]:
        assert isinstance(each, dict), each
        assert each["right"]
        assert (each["captured"], each["after release"], each["captured again"]) == (2, 0, 2)
    alone = [each["alone"] for each in results["compiled_and_released"]]
    assert alone[0] == ""
    assert "graphcap.release() included" in alone[1]


def test_ladder_that_was_captured_serves_different_sizes_without_a_question(results: dict[str, list[Any]]) -> None:
    both = Both(results, "ladder_captured_beforehand")
    assert both["captured"] == [8, 4]
    assert both["replays"] >= 5
    assert both["asked"] == []


def assert_captured(ranks: list[Any], mode: str, segments: int) -> None:
    """A compiled block has a plan in each of its two regions on both ranks, and was right all along."""
    first, second = ranks
    assert isinstance(first, dict), first
    assert first == second
    assert first["right"]
    assert first["failures"] == []
    assert first["modes"] == [mode, mode]
    assert first["segments"] == [segments, segments]


@pytest.mark.parametrize(("mode", "segments"), [("FULL", 1), ("PIECEWISE", 2)])
def test_compiled_block_of_tensor_parallelism(results: dict[str, list[Any]], mode: str, segments: int) -> None:
    assert_captured(results[f"compiled_{mode.lower()}"], mode, segments)


def test_processes_end(results: dict[str, list[Any]]) -> None:
    assert results["exit codes"] == [0, 0]
