"""Life and death of plans under a compiled model: whatever ends it, memory returns to where it began."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

import graphcap
from graphcap.compiler import backend
from graphcap.compiler.region import all_regions
from graphcap.cudagraph import device_for
from graphcap.cudagraph.hardware.memory import GraphMemory
from tests.compiler.small import Mlp

OPTIONS = {"compiler": "eager", "simulate": True}


@pytest.fixture(autouse=True)
def nothing_left_behind():
    graphcap.reset()
    yield
    graphcap.reset()


def held() -> GraphMemory:
    gc.collect()
    device, _ = device_for(set(), simulate=True)
    return graphcap.memory()[device.name]


def called(model: nn.Module, fn, *, calls: int = 4) -> None:
    with torch.no_grad():
        for _ in range(calls):
            x = torch.randn(3, 4)
            assert torch.equal(fn(x), torch.relu(x * model.weight) + 1)


def through_torch(model: nn.Module):
    return torch.compile(model, backend=backend.graphcap, options=OPTIONS)


def through_graphcap(model: nn.Module):
    return graphcap.compile(model, dynamic_arg_dims={"x": 0}, **OPTIONS)


@pytest.fixture(params=[through_torch, through_graphcap])
def compiled(request):
    return request.param


def delete_model(holder: list) -> None:
    holder.clear()


def torch_reset(holder: list) -> None:
    torch.compiler.reset()


def graphcap_reset(holder: list) -> None:
    graphcap.reset()


def drop_code_entry(holder: list) -> None:
    (region,) = all_regions()
    torch._C._dynamo.eval_frame.reset_code(region.code)


@pytest.mark.parametrize("end", [delete_model, torch_reset, graphcap_reset, drop_code_entry])
def test_memory_returns_to_where_it_began(compiled, end):
    begin = held()
    model = Mlp().eval()
    holder = [model, compiled(model)]
    called(holder[0], holder[1])
    assert held().num_plans == begin.num_plans + 1
    assert held().used_bytes > begin.used_bytes
    del model
    end(holder)
    assert held() == begin


def test_release_drops_the_graphs_and_the_next_call_recaptures(compiled):
    begin = held()
    model = Mlp().eval()
    fast = compiled(model)
    called(model, fast)
    graphcap.release(fast)
    assert held() == begin
    traced = len(all_regions())
    model.weight.data = torch.randn(4)  # the weights come back somewhere else
    called(model, fast, calls=1)
    assert held().num_plans == 1
    assert len(all_regions()) == traced, "compiled code stays"
    called(model, fast)


def test_release_leaves_other_models_alone():
    one, other = Mlp().eval(), Mlp().eval()
    fast, slow = (graphcap.compile(model, dynamic_arg_dims={"x": 0}, **OPTIONS) for model in (one, other))
    called(one, fast)
    called(other, slow)
    before = held().num_plans
    graphcap.release(one)
    assert held().num_plans == before - 1


def test_model_works_after_a_reset(compiled):
    model = Mlp().eval()
    fast = compiled(model)
    called(model, fast)
    graphcap.reset()
    assert all_regions() == []
    called(model, fast)
    assert held().num_plans == 1
    assert len(all_regions()) == 1, "it was traced again"


def test_private_pool_belongs_to_the_region():
    model = Mlp().eval()
    fast = graphcap.compile(model, dynamic_arg_dims={"x": 0}, pool="private", **OPTIONS)
    called(model, fast)
    shared, _ = device_for(set(), simulate=True)
    assert shared.used_bytes() == 0
    assert held().num_plans == 1


def test_budget_of_a_model_holds():
    model = Mlp().eval()
    fast = graphcap.compile(model, dynamic_arg_dims={"x": 0}, max_graph_bytes=0, **OPTIONS)
    called(model, fast)
    (region,) = all_regions()
    (runner,) = region.runners
    assert runner.stats.plans == []
    assert held().exclusive_bytes == 0


def test_release_of_something_that_cannot_be_compiled():
    with pytest.raises(TypeError):
        graphcap.release(3)


@pytest.mark.gpu
@pytest.mark.parametrize("end", [delete_model, torch_reset, graphcap_reset, drop_code_entry])
def test_device_memory_returns_to_where_it_began(compiled, end):
    def reserved() -> int:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    def one_life() -> None:
        graphcap.reset()
        model = Mlp()
        model.weight = nn.Parameter(torch.randn(2**18))
        model.eval().cuda()
        holder = [model, compiled(model)]
        with torch.no_grad():
            for _ in range(5):
                x = torch.randn(4, 2**18, device="cuda")  # 4 MiB, in few enough rows for the ladder
                torch.testing.assert_close(holder[1](x), torch.relu(x * model.weight) + 1)
        assert graphcap.memory()["cuda:0"].num_plans == 1
        del x, model
        end(holder)
        del holder

    one_life()
    before = reserved()
    one_life()
    assert reserved() <= before
    assert graphcap.memory()["cuda:0"].num_plans == 0
