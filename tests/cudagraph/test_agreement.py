"""Deciding alone, and in a group of one: the questions cost nothing, or go through a real process group."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import graphcap
from graphcap import Config, ConfigError, RankError
from graphcap.cudagraph.agreement import agreement_of, alone
from graphcap.cudagraph.recording.recorded import Failure
from tests.cudagraph.regions import Region, runner_of


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Any]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    if dist.is_initialized():
        dist.destroy_process_group()


def test_alone() -> None:
    assert agreement_of(None) is alone
    assert alone.gather("anything", 3) == [3]
    assert alone.reason("anything", "full") == "full"
    assert not alone.is_group


def test_one_agreement_for_each_group(group: Any) -> None:
    found = agreement_of(group)
    assert found.is_group
    assert agreement_of(group) is found
    assert found.gather("anything", (3, "x")) == [(3, "x")]
    assert found.reason("anything", "full") == "full"


def test_group_that_is_gone(group: Any) -> None:
    found = agreement_of(group)
    dist.destroy_process_group()
    with pytest.raises(RankError, match="no answer from the other ranks to 'room'"):
        found.gather("room", 3)


@pytest.mark.parametrize(
    ("failures", "expected"),
    [
        ([None, None], None),
        ([None, Failure((3,), "boom")], Failure((3,), "rank 1: boom")),
        ([Failure((3,), "boom"), Failure((3,), "boom")], Failure((3,), "boom")),
        ([Failure((5,), "boom"), None, Failure((), "full", True)], Failure((5,), "rank 0: boom", True)),
        ([Failure((5,), "a"), Failure((2, 5), "b")], Failure((2, 5), "rank 0: a")),
    ],
)
def test_failures_of_several_ranks(failures: list[Failure | None], expected: Failure | None) -> None:
    assert Failure.of_ranks(failures) == expected


def test_setting(group: Any) -> None:
    config = Config(process_group=group)
    assert config.process_group is group
    assert Config.resolve(config.to_dict(), environ={}) == config
    assert copy.deepcopy(config).process_group is group
    assert pickle.loads(pickle.dumps(config)) == Config(), "a group is of one process"
    assert hash(config) == hash(Config())
    assert config != Config()


@pytest.mark.parametrize("value", ["WORLD", 0, object()])
def test_what_is_no_group(value: object) -> None:
    with pytest.raises(ConfigError, match=r"process_group: expected a torch\.distributed\.ProcessGroup or None"):
        Config(process_group=value)


def test_through_torch_compile(group: Any) -> None:
    def doubled(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    options = {"compiler": "eager", "simulate": True, "process_group": group}
    compiled = torch.compile(doubled, backend="graphcap", options=options)
    with torch.no_grad():
        for _ in range(5):
            assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 2.0))
    (region,) = graphcap.explain(compiled).regions
    assert region.replays == 2
    assert next(each for each in region.settings if each.name == "process_group").origin == "code"


def test_comparisons_are_left_out_in_a_group(group: Any) -> None:
    region = Region()
    x = region.tensor("x")
    runner = runner_of(region.returning(region.step(lambda x: x + 1, x)), process_group=group, verify=True)
    for _ in range(5):
        runner(torch.ones(3))
    assert runner.stats.replays == 2
    assert runner.stats.unchecked == {"step_0": "replays are not compared in a process group"}
