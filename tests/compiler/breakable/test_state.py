"""What belongs to the key: arguments that are no tensors, modules and their mode, parameters by name."""

from __future__ import annotations

import gc
import weakref
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import graphcap
from graphcap.compiler.breakable.state import walk
from graphcap.compiler.breakable.watch import Watch
from tests.compiler.breakable.like_original import CALLS, Mlp, breakable, num_replays, rows, target_of


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def warm(captured: Any, *args: Any, **kwargs: Any) -> None:
    for _ in range(CALLS):
        captured(*args, **kwargs)
    assert num_replays(captured) >= 2


def test_a_branch_on_an_argument_has_a_recording_per_value() -> None:
    def scaled(x: Tensor, k: int = 1, mode: str = "add") -> Tensor:
        for _ in range(k):
            x = x + 1 if mode == "add" else x * 2
        return x

    captured = breakable(scaled)
    x = rows()
    for k in (1, 3):
        for mode in ("add", "mul"):
            warm(captured, x, k, mode)
    for k in (3, 1):
        for mode in ("mul", "add"):
            torch.testing.assert_close(captured(x, k, mode=mode), scaled(x, k, mode))
    assert num_replays(captured) >= 12


@pytest.mark.parametrize("pair", [(1, True), (1, 1.0), (0.0, -0.0), (torch.float32, torch.float64), (None, 0)])
def test_equal_values_of_another_kind_are_other_arguments(pair: tuple[Any, Any]) -> None:
    captured = breakable(lambda x, value: x + 1)
    for value in pair:
        captured(rows(), value)
    assert len(graphcap.explain(captured).regions) == 2


@pytest.mark.parametrize("other", [torch.ones(5, 4), torch.ones(3, 4).double(), torch.ones(4, 3).t()])
def test_tensors_of_another_layout_are_other_arguments(other: Tensor) -> None:
    captured = breakable(lambda x: x.view(-1) if x.is_contiguous() else x.sum())
    warm(captured, torch.ones(3, 4))
    before = captured(other)
    torch.testing.assert_close(before, other.view(-1) if other.is_contiguous() else other.sum())
    assert len(graphcap.explain(captured).regions) == 2


def test_train_and_eval_have_recordings_of_their_own() -> None:
    model = breakable(Mlp().eval())
    nn.init.ones_(model.fc.weight)
    x = rows().abs()
    warm(model, x)
    still = model(x)
    model.train()
    warm(model, x)
    assert not torch.equal(model(torch.ones(3, 4)), model(torch.ones(3, 4)))
    model.drop.eval()
    torch.testing.assert_close(model(x), still)
    model.eval()
    replays = num_replays(model)
    torch.testing.assert_close(model(x), still)
    assert num_replays(model) == replays + 1


def test_a_replaced_parameter_is_used() -> None:
    model = breakable(Mlp().eval())
    x = rows()
    warm(model, x)
    model.fc.weight = nn.Parameter(torch.zeros(4, 4), requires_grad=False)
    model.fc.bias.data = torch.ones(4)
    for _ in range(CALLS):
        assert torch.equal(model(x), torch.ones(3, 4))
    (region,) = graphcap.explain(model).regions
    assert not region.bypass
    assert region.recaptures == 1


def test_a_parameter_of_another_dtype_is_recorded_anew() -> None:
    model = breakable(Mlp().eval())
    warm(model, rows())
    model.double()
    x = rows().double()
    got = model(x)
    assert got.dtype is torch.float64
    torch.testing.assert_close(got, torch.relu(x @ model.fc.weight.t() + model.fc.bias))


def test_a_parameter_that_changes_its_dtype_in_place_is_recorded_anew() -> None:
    class Follows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return x.to(self.weight.dtype) * self.weight

    model = breakable(Follows())
    x = rows()
    warm(model, x)
    model.weight.data = model.weight.data.double()
    for _ in range(CALLS):
        assert model(x).dtype is torch.float64
    assert [region.bypass for region in graphcap.explain(model).regions] == ["", ""]


def test_a_replaced_submodule_is_recorded_anew() -> None:
    model = breakable(Mlp().eval())
    x = rows()
    warm(model, x)
    model.fc = nn.Identity()
    torch.testing.assert_close(model(x), torch.relu(x))
    (region,) = graphcap.explain(model).regions
    assert region.replays == 0


def test_a_late_hook_runs() -> None:
    model = breakable(Mlp().eval())
    x = rows()
    warm(model, x)
    before = model(x)
    model.fc.register_forward_hook(lambda module, args, output: output - 100)
    assert model(x).sum() == 0
    assert before.sum() != 0


def test_hooks_of_others_are_nothing_to_us() -> None:
    model, other = breakable(Mlp().eval()), nn.Linear(4, 4)
    for _ in range(CALLS):
        other.register_forward_hook(lambda module, args, output: None).remove()
        model(rows())
    assert num_replays(model) == CALLS - 4


def test_two_instances_have_their_own() -> None:
    first, second = breakable(Mlp().eval()), breakable(Mlp().eval())
    x = rows()
    warm(first, x)
    warm(second, x)
    torch.testing.assert_close(first(x), torch.relu(first.fc(x)))
    torch.testing.assert_close(second(x), torch.relu(second.fc(x)))
    assert [len(graphcap.explain(each).regions) for each in (first, second)] == [1, 1]


class Cache:
    """A cache as models have them: an object that holds tensors."""

    def __init__(self) -> None:
        self.keys = [torch.zeros(8, 4) for _ in range(2)]
        self.scale = 1.0


class Cached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, at: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        for keys in cache.keys:
            keys.index_copy_(0, at, self.fc(x) * cache.scale)
        return cache.keys[0].sum(0), cache


def test_tensors_of_an_argument_are_found_through_it() -> None:
    model = breakable(Cached())
    cache, x, at = Cache(), rows(2), torch.tensor([0, 1])
    warm(model, x, at, cache)
    assert num_replays(model) >= 2
    cache.keys[1] = torch.zeros(8, 4)
    out, same = model(x, at, cache)
    assert same is cache
    torch.testing.assert_close(cache.keys[1], cache.keys[0])
    torch.testing.assert_close(out, model.fc(x).sum(0))
    (region,) = graphcap.explain(model).regions
    assert {"cache.keys.0", "cache.keys.1"} <= set(region.bindings)
    cache.scale = 2.0
    torch.testing.assert_close(model(x, at, cache)[0], 2 * model.fc(x).sum(0))


def test_neither_the_cache_nor_the_model_is_kept_alive() -> None:
    model, cache = breakable(Cached()), Cache()
    x, at = rows(2), torch.tensor([0, 1])
    for _ in range(CALLS):
        model(x, at, cache)
    assert num_replays(model) >= 2
    target = target_of(model)
    watched = [weakref.ref(each) for each in (cache, cache.keys[0], model, model.fc.weight, x)]
    gc.collect()
    gc.disable()
    try:
        del x
        assert watched[4]() is None
        del cache
        assert [each() for each in watched[:2]] == [None, None]
        assert not target._entries
        del model, target
        assert [each() for each in watched] == [None] * 5
    finally:
        gc.enable()


def test_a_global_number_is_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    captured = breakable(uses_a_global)
    x = rows()
    warm(captured, x)
    monkeypatch.setitem(globals(), "FACTOR", 5.0)
    torch.testing.assert_close(captured(x), x * 5)


FACTOR = 2.0


def uses_a_global(x: Tensor) -> Tensor:
    return x * FACTOR


def test_what_is_made_at_the_first_call_is_no_obstacle() -> None:
    class Lazy(nn.Module):
        table: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.table is None:
                self.table = torch.arange(4.0)
            return x * self.table

    model = breakable(Lazy())
    x = rows()
    for _ in range(CALLS + 1):
        torch.testing.assert_close(model(x), x * torch.arange(4.0))
    assert num_replays(model) >= 2


def test_too_many_recordings_are_said(caplog: pytest.LogCaptureFixture) -> None:
    captured = breakable(lambda x, k: x + k, max_plans=2)
    for k in range(30):
        assert torch.equal(captured(torch.zeros(1), k), torch.full((1,), float(k)))
    assert len(graphcap.explain(captured).regions) < 30
    assert any("should be a tensor" in note for note in graphcap.explain(captured).notes)


def test_watch_takes_a_tensor_of_the_same_layout_and_nothing_else() -> None:
    holder = {"a": [torch.ones(2)]}
    roots = [holder]
    found = [each for each in walk(roots) if isinstance(each.value, Tensor)]
    watch = Watch(lambda: roots, found, ())
    assert [each.name for each in found] == ["a.0"]
    assert [each is holder["a"][0] for each in watch.find() or []] == [True]
    new = torch.zeros(2)
    holder["a"] = [new]
    (now,) = watch.find() or []
    assert now is new
    holder["a"][0] = torch.zeros(3)
    assert watch.find() is None
    del holder["a"]
    assert watch.find() is None


def test_an_argument_that_is_also_an_attribute_is_not_mistaken_for_it() -> None:
    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.table

    model = breakable(Holds())
    warm(model, model.table)
    for _ in range(CALLS):
        torch.testing.assert_close(model(torch.zeros(4)), torch.ones(4))
    torch.testing.assert_close(model(model.table), torch.full((4,), 2.0))


def test_the_default_device_is_part_of_the_key() -> None:
    captured = breakable(lambda k: torch.ones(k, 1))
    for _ in range(CALLS):
        assert captured(2).device.type == "cpu"
    with torch.device("meta"):
        assert captured(2).device.type == "meta"
    assert captured(2).device.type == "cpu"


def test_transforms_and_modes_of_others_see_the_function() -> None:
    captured = breakable(lambda x: x * 2)
    x = rows()
    warm(captured, x)
    replays = num_replays(captured)
    torch.testing.assert_close(torch.vmap(captured)(x), x * 2)
    with FakeTensorMode() as mode:
        assert isinstance(captured(mode.from_tensor(x)), FakeTensor)
    assert num_replays(captured) == replays


def test_an_object_that_pretends_to_be_a_tensor_is_none() -> None:
    """A mock with a spec answers ``isinstance`` for its spec; it has neither memory nor a layout."""
    module = nn.Linear(4, 4)
    module.pretender = Mock(spec=Tensor)  # type: ignore[assignment]
    captured = breakable(module)
    warm(captured, rows())
    x = rows()
    torch.testing.assert_close(captured(x), module(x))
