"""Two ranks on two GPUs with sums over NCCL: captured in FULL and in PIECEWISE, a failure on one rank, the end."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.gpu_scenarios import ALL
from tests.distributed.test_two_ranks import Both, assert_captured
from tests.distributed.two_ranks import run_on_two_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

EVERYTHING = ["step_0", "step_1", "step_2", "step_3", "step_4"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return run_on_two_ranks(ALL, tmp_path_factory.mktemp("two_gpus"), "nccl")


def test_sums_inside_of_graphs(results: dict[str, list[Any]]) -> None:
    both = Both(results, "sums_in_graphs")
    assert both.captured() == {(3,): EVERYTHING}
    assert both["replays"] == 5


def test_sums_between_graphs(results: dict[str, list[Any]]) -> None:
    both = Both(results, "sums_between_graphs")
    assert both.captured() == {(3,): ["step_0", "step_2", "step_4"]}
    assert both["replays"] == 5


@pytest.mark.parametrize(
    ("scenario", "step", "left"),
    [
        ("failure_after_the_sums", "step_4", EVERYTHING[:4]),
        ("failure_before_the_sums", "step_0", EVERYTHING[1:]),
        ("failure_between_live_sums", "step_2", ["step_0", "step_4"]),
    ],
)
def test_capture_that_fails_on_one_rank_is_given_up_by_both(
    results: dict[str, list[Any]], scenario: str, step: str, left: list[str]
) -> None:
    for each in results[scenario]:
        each["sums"] = bool(each["sums"])  # how often Python came by, which differs: to record one is not to run it
    both = Both(results, scenario)
    (failure,) = both["failures"]
    assert failure.startswith(f"{step}: rank 1: ")
    assert both.captured() == {(3,): left}
    assert both["replays"] == 4


@pytest.mark.parametrize(("mode", "segments"), [("FULL", 1), ("PIECEWISE", 2)])
def test_compiled_block_of_tensor_parallelism(results: dict[str, list[Any]], mode: str, segments: int) -> None:
    assert_captured(results[f"compiled_{mode.lower()}"], mode, segments)


def test_processes_end_with_graphs_alive(results: dict[str, list[Any]]) -> None:
    assert results["left_alive"] == [True, True]
    assert results["exit codes"] == [0, 0]
