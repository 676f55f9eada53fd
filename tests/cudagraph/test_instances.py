"""Several model instances that Dynamo serves with one graph have plans of their own."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import graphcap
from graphcap.compiler.backend import graphcap as backend
from graphcap.config import Config
from graphcap.cudagraph import GraphRunner, InputKind, InputSpec, Program, Step, graph_runner
from graphcap.cudagraph.dispatch.phase import allow_capture
from graphcap.cudagraph.hardware.simulated import SimulatedDevice


def scale(weight: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor]:
    return (weight * x,)


def weighted() -> Program:
    """Returns weight * x."""
    inputs = (InputSpec("weight", InputKind.STATIC, is_parameter=True), InputSpec("x", InputKind.TENSOR))
    return Program("weighted", inputs, (Step("scale", scale, (0, 1), (2,)),), (2,), scale)


@pytest.fixture
def runners() -> list[GraphRunner]:
    return []


@pytest.fixture
def call(runners: list[GraphRunner]) -> Any:
    return graph_runner(weighted(), SimulatedDevice(), Config(simulate=True), runners.append)


def test_instances_alternate_without_disturbing_each_other(call: Any, runners: list[GraphRunner]) -> None:
    first, second = torch.full((3,), 2.0), torch.full((3,), 5.0)
    for number in range(6):
        x = torch.full((3,), float(number))
        assert torch.equal(call(first, x)[0], 2 * x)
        assert torch.equal(call(second, x)[0], 5 * x)
    assert [(r.stats.replays, r.stats.recaptures) for r in runners] == [(3, 0), (3, 0)]


def test_moved_weights_of_one_instance_stay_that_instance(call: Any, runners: list[GraphRunner]) -> None:
    """Field notes row 12: of two instances that share code only the one whose weights moved is captured again."""
    weight, x = torch.ones(3), torch.ones(3)
    for value in (2.0, 3.0):
        weight.data = torch.full((3,), value)
        for _ in range(4):
            assert torch.equal(call(weight, x)[0], value * x)
    assert len(runners) == 1
    assert runners[0].stats.recaptures == 1


def test_plans_go_with_their_instance(call: Any, runners: list[GraphRunner]) -> None:
    weight = torch.ones(3)
    for _ in range(4):
        call(weight, torch.ones(3))
    runner = weakref.ref(runners.pop())
    del weight
    gc.collect()
    assert runner() is None


def sum_of(*args: torch.Tensor) -> tuple[torch.Tensor]:
    return (sum(args[:-1]) * args[-1],)


@pytest.fixture
def call_with_five(runners: list[GraphRunner]) -> Any:
    """Of five parameters and x the sum times x."""
    inputs = tuple(InputSpec(f"weight_{n}", InputKind.STATIC, is_parameter=True) for n in range(5))
    step = Step("sum", sum_of, tuple(range(6)), (6,))
    program = Program("five", (*inputs, InputSpec("x", InputKind.TENSOR)), (step,), (6,), sum_of)
    return graph_runner(program, SimulatedDevice(), Config(simulate=True), runners.append)


def five(first: float) -> list[torch.Tensor]:
    """Parameters that hold this number and the next ones."""
    return [torch.full((3,), first + n) for n in range(5)]


def call_four_times(call_with_five: Any, weights: list[torch.Tensor]) -> None:
    """As often as it takes to be captured and replayed once."""
    for _ in range(4):
        assert torch.equal(call_with_five(*weights, torch.ones(3))[0], sum(weights))


@pytest.mark.parametrize("which", range(5))
def test_a_replaced_parameter_leaves_the_instance_what_it_was(
    which: int, call_with_five: Any, runners: list[GraphRunner]
) -> None:
    """Whichever it is: its plan is captured again, and nothing is forgotten."""
    weights, x = [torch.full((3,), float(n)) for n in range(5)], torch.ones(3)
    for number in range(4):
        for _ in range(4):
            assert torch.equal(call_with_five(*weights, x)[0], sum(weights))
        weights[which] = torch.full((3,), 10.0 + number)
    (runner,) = runners
    assert runner.stats.recaptures == 3
    assert runner.stats.replays >= 4


def test_another_instance_is_no_changed_one(call_with_five: Any, runners: list[GraphRunner]) -> None:
    """Two models may share a parameter, and one of them may lose another."""
    shared, x = torch.ones(3), torch.ones(3)
    first, second = [[shared, *(torch.full((3,), value) for _ in range(4))] for value in (2.0, 3.0)]
    for _ in range(4):
        assert torch.equal(call_with_five(*first, x)[0], sum(first))
    first[2] = torch.full((3,), 7.0)
    for _ in range(4):
        assert torch.equal(call_with_five(*second, x)[0], sum(second))
        assert torch.equal(call_with_five(*first, x)[0], sum(first))
    assert len(runners) == 2


def test_an_instance_is_gone_with_most_of_its_parameters(call_with_five: Any, runners: list[GraphRunner]) -> None:
    shared = torch.ones(3)
    weights = [shared, *(torch.ones(3) for _ in range(4))]
    for _ in range(4):
        call_with_five(*weights, torch.ones(3))
    runner = weakref.ref(runners.pop())
    del weights
    gc.collect()
    assert runner() is None


def test_an_instance_all_of_whose_parameters_were_replaced_has_its_plans_again_where_captures_are_sealed(
    call_with_five: Any, runners: list[GraphRunner]
) -> None:
    """``load_state_dict(assign=True)`` between two requests. No shape gets a plan that had none."""
    weights = five(0)
    call_four_times(call_with_five, weights)
    assert runners.pop().stats.replays == 1
    with allow_capture(False):
        del weights
        weights = five(10)
        call_four_times(call_with_five, weights)
        assert runners[0].stats.replays == 1
        others = five(20)
        call_four_times(call_with_five, others)
        assert runners[1].stats.captures == 0, "one more model is not what was replaced"


def test_where_the_old_weights_outlive_the_first_call_with_new_ones_plans_come_when_they_go(
    call_with_five: Any, runners: list[GraphRunner]
) -> None:
    """Somebody keeps a copy of the state until the new one is seen to work."""
    weights = five(0)
    call_four_times(call_with_five, weights)
    del runners[0]
    with allow_capture(False):
        before, weights = weights, five(10)
        call_four_times(call_with_five, weights)
        assert runners[0].stats.captures == 0
        del before
        call_four_times(call_with_five, weights)
        assert runners[0].stats.replays >= 1


def test_a_model_that_went_before_the_seal_leaves_nothing_to_one_that_comes_after_it(
    call_with_five: Any, runners: list[GraphRunner]
) -> None:
    weights = five(0)
    call_four_times(call_with_five, weights)
    del runners[0], weights
    with allow_capture(False):
        others = five(20)
        call_four_times(call_with_five, others)
        assert runners[0].stats.captures == 0


def test_one_that_went_without_plans_leaves_those_of_another_to_whom_they_belong(
    call_with_five: Any, runners: list[GraphRunner]
) -> None:
    weights, others = five(0), five(5)
    call_with_five(*others, torch.ones(3))
    call_four_times(call_with_five, weights)
    runners.clear()
    with allow_capture(False):
        del others
        del weights
        weights = five(10)
        call_four_times(call_with_five, weights)
        assert [runner.stats.captures for runner in runners] == [1]


def test_of_threads_that_make_the_first_call_with_new_weights_the_winner_has_the_plans(
    call_with_five: Any, runners: list[GraphRunner]
) -> None:
    weights = five(0)
    call_four_times(call_with_five, weights)
    with allow_capture(False):
        for trial in range(10):
            runners.clear()
            del weights
            weights = five(10 * trial)
            together = threading.Barrier(4)

            def first_call(*weights: torch.Tensor, together: threading.Barrier = together) -> None:
                together.wait()
                with torch.no_grad():
                    call_with_five(*weights, torch.ones(3))

            threads = [threading.Thread(target=first_call, args=weights) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            call_four_times(call_with_five, weights)
            assert [runner.stats.captures for runner in runners] == [1]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).relu()


def test_two_models_of_one_class_under_torch_compile() -> None:
    models = [Layer().eval() for _ in range(2)]
    fast = [torch.compile(m, backend=backend, options={"compiler": "eager", "simulate": True}) for m in models]
    with torch.no_grad():
        for _ in range(6):
            x = torch.randn(2, 4)
            for model, compiled in zip(models, fast, strict=True):
                assert torch.equal(compiled(x), model(x))
    for compiled in fast:
        regions = graphcap.explain(compiled).regions
        assert sum(region.replays for region in regions) == 3
        assert all(region.recaptures == 0 for region in regions)


def test_counters_of_a_region_only_grow_whatever_becomes_of_its_instances() -> None:
    torch.compiler.reset()
    graphcap.reset()
    models = [Layer().eval() for _ in range(2)]
    for model in models:
        model.compile(backend=backend, options={"compiler": "eager", "simulate": True})

    def counted() -> dict[str, float]:
        found = graphcap.explain().metrics()
        return {name: value for name, value in found.items() if "_total" in name and "seconds" not in name}

    with torch.no_grad():
        for _ in range(6):
            for model in models:
                model(torch.randn(2, 4))
        before, plans = counted(), graphcap.explain().metrics()["graphcap_plans"]
        assert before["graphcap_replays_total"] >= 6
        del model
        models.pop()
        gc.collect()
        assert graphcap.explain().metrics()["graphcap_plans"] < plans, "the plans are gone with the model"
        assert counted() == before
        models[0](torch.randn(2, 4))
    assert counted()["graphcap_replays_total"] == before["graphcap_replays_total"] + 1
