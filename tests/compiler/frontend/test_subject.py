"""What belongs to what the user has in hand, where Dynamo serves several instances with one graph."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import graphcap
from graphcap.compiler.backend import graphcap as backend

OPTIONS: dict[str, Any] = {
    "compiler": "eager", "simulate": True, "dynamic_arg_dims": {"x": {0: "num_tokens"}}, "capture_sizes": [4],
}  # fmt: skip


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.middle(self.first(x)).relu())

    def other(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + 1


class WithAListOfItsOwn(Layer):
    """It keeps a parameter where ``parameters()`` does not look, and uses it last."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = [nn.Parameter(torch.ones(4))]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.hidden[0]


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(compiled(Layer()) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def compiled(model: nn.Module, **options: Any) -> nn.Module:
    model.eval().compile(backend=backend, options={**OPTIONS, **options}, dynamic=True)
    return model


@pytest.fixture(autouse=True)
def _anew() -> None:
    torch.compiler.reset()
    graphcap.reset()


def call(*targets: Callable[[torch.Tensor], Any], times: int = 6) -> None:
    with torch.no_grad():
        for _ in range(times):
            for target in targets:
                target(torch.randn(4, 4))


def counted(target: Any) -> tuple[int, int]:
    """Plans and replays."""
    (region,) = graphcap.explain(target).regions
    return len(region.plans), region.replays


def mode(target: Any) -> str:
    return graphcap.dispatch(target, num_tokens=4).mode.name


@pytest.mark.parametrize("kind", [Layer, WithAListOfItsOwn])
def test_each_of_two_models_is_asked_for_itself(kind: type[Layer]) -> None:
    first, second = compiled(kind()), compiled(kind())
    call(first)
    call(second, times=1)
    names = [graphcap.explain(each).regions[0].name for each in (first, second)]
    assert names[0] == names[1], "they share a graph"
    plans, replays = counted(first)
    assert plans == 1
    assert replays >= 2
    assert counted(second) == (0, 0)
    call(second, times=5)
    assert counted(first) == counted(second) == (1, replays)
    graphcap.release(second)
    assert counted(first) == (1, replays)
    assert counted(second) == (0, replays)
    assert graphcap.explain().metrics()["graphcap_replays_total"] == 2 * replays


@pytest.mark.parametrize("name", ["first", "middle", "last"])
def test_a_model_with_a_new_weight_is_still_itself(name: str) -> None:
    first, second = compiled(Layer()), compiled(Layer())
    call(first, second)
    _, replays = counted(first)
    getattr(first, name).weight = nn.Parameter(torch.randn(4, 4))
    assert (mode(first), counted(first)) == ("FULL", (1, replays))
    with torch.no_grad():
        for _ in range(4):
            with graphcap.step(num_tokens=4, dispatch=graphcap.dispatch(first, num_tokens=4)):
                first(torch.randn(4, 4))
    assert counted(first)[1] > replays, "who does as dispatch says is not stuck"
    getattr(first, name).weight = nn.Parameter(torch.randn(4, 4))
    graphcap.release(first)
    assert counted(first)[0] == 0
    assert counted(second)[0] == 1


def test_what_was_compiled_first_may_go() -> None:
    models = [compiled(Layer()) for _ in range(3)]
    call(*models)
    of_each = counted(models[1])
    del models[0]
    gc.collect()
    assert [counted(model) for model in models] == [of_each, of_each]
    graphcap.release(models[0])
    assert [counted(model)[0] for model in models] == [0, 1]


def test_what_one_has_counted_is_not_counted_for_another() -> None:
    first, second = compiled(Layer()), compiled(Layer())
    call(first, second)
    of_first = counted(first)
    del second
    gc.collect()
    assert counted(first) == of_first
    third = compiled(Layer())
    call(third)
    assert counted(first) == of_first


def test_a_model_that_is_alone_is_whole_however_it_is_specialised() -> None:
    model = compiled(Layer(), compile_sizes=[2])
    call(model)
    model.first.weight = nn.Parameter(torch.randn(4, 4))
    graphcap.release(model)
    assert sum(len(region.plans) for region in graphcap.explain(model).regions) == 0


def test_a_function_has_all_that_was_captured_for_it() -> None:
    def run(model: Layer, x: torch.Tensor) -> torch.Tensor:
        return model(x)

    fast = torch.compile(run, backend=backend, options=OPTIONS, dynamic=True)
    models = [Layer().eval() for _ in range(2)]
    call(*(lambda x, model=model: fast(model, x) for model in models))
    plans, replays = counted(fast)
    assert plans == 2
    assert replays >= 4
    assert mode(fast) == "FULL"
    graphcap.release(fast)
    assert counted(fast) == (0, replays)


def test_a_bound_method_is_that_of_its_object() -> None:
    models = [Layer().eval() for _ in range(2)]
    fast = [torch.compile(model.other, backend=backend, options=OPTIONS, dynamic=True) for model in models]
    call(*fast)
    before = [counted(each) for each in fast]
    assert [plans for plans, _ in before] == [1, 1]
    graphcap.release(fast[1])
    assert [counted(each)[0] for each in fast] == [1, 0]


def test_a_module_has_what_its_parts_have() -> None:
    """Layers compiled one by one, all four with one graph."""
    first, second = Outer(), Outer()
    call(first, second)
    assert [counted(each)[0] for each in (first, second)] == [2, 2]
    assert counted(first.layers[0])[0] == 1
    graphcap.release(first)
    assert [counted(each)[0] for each in (first, second)] == [0, 2]


class Adapted(nn.Module):
    """Two layers of a base that others may have as well, and one of its own."""

    def __init__(self, base: nn.ModuleList) -> None:
        super().__init__()
        self.base, self.adapter = base, nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.adapter(self.base[1](self.base[0](x).relu()))


def test_adapters_over_one_base_are_told_apart() -> None:
    base = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
    first, second = compiled(Adapted(base)), compiled(Adapted(base))
    call(first)
    call(second, times=5)
    assert counted(first)[1] == counted(second)[1] + 1
    graphcap.release(second)
    assert [counted(each)[0] for each in (first, second)] == [1, 0]


@pytest.mark.parametrize("of", [lambda model: model, lambda model: model.forward], ids=["module", "method"])
def test_a_weight_in_common_is_not_enough(of: Callable[[nn.Module], Any]) -> None:
    first, second = compiled(Layer()), compiled(Layer())
    second.first.weight = first.first.weight
    call(first)
    assert graphcap.explain(of(second)).regions == ()
    assert mode(of(second)) == "NONE"
    graphcap.release(of(second))
    assert counted(first)[0] == 1


def test_a_weight_in_common_with_a_part_is_not_enough() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(4, 4, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(4, 4, bias=False), Head()

    first, second = Model(), Model()
    compiled(first.head)
    second.embed.weight = first.head.out.weight
    call(first.head)
    assert counted(first)[0] == 1
    assert graphcap.explain(second).regions == ()


def test_a_model_all_of_whose_weights_are_new_has_nobody_elses_plans() -> None:
    first, second = compiled(Layer()), compiled(Layer())
    call(first, second)
    second.load_state_dict({name: torch.randn_like(value) for name, value in second.state_dict().items()}, assign=True)
    assert mode(second) == "NONE"
    graphcap.release(second)
    assert counted(first)[0] == 1


def test_a_method_that_graphcap_compiled_is_that_of_its_object() -> None:
    class Model(Layer):
        def run(self, x: torch.Tensor) -> torch.Tensor:
            return self.forward(x)

        run = graphcap.compile(run, **OPTIONS)  # type: ignore[assignment]

    first, second = Model().eval(), Model().eval()
    call(first.run, second.run)
    before = graphcap.explain().metrics()["graphcap_plans"]
    assert before == 2
    graphcap.release(second.run)
    assert graphcap.explain().metrics()["graphcap_plans"] == 1
    assert sum(len(region.plans) for region in graphcap.explain(first.run).regions) == 1


def test_a_finalizer_may_ask_while_counters_are_read() -> None:
    """Collected in the middle of a report, or of a call that makes a runner: nobody waits for himself."""

    class Engine:
        def __init__(self, model: nn.Module) -> None:
            self.model, self.itself = model, self

        def __del__(self) -> None:
            graphcap.release(self.model)
            graphcap.explain()

    model = compiled(Layer())
    call(model)
    threshold = gc.get_threshold()
    gc.set_threshold(5)
    try:
        for _ in range(100):
            Engine(model)
            graphcap.explain().metrics()
        call(compiled(Layer()), times=1)
    finally:
        gc.set_threshold(*threshold)
