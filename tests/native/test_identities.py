"""IdentityCheck, in Python and in C++."""

from __future__ import annotations

import gc
import sys
import weakref
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from graphcap.native import IdentityCheck


def check_of(checks: ModuleType, module: nn.Module) -> IdentityCheck:
    """Every submodule, parameter and buffer, and the dicts that hold them."""
    entries: list[tuple[dict[str, Any], str, object]] = []
    for each in module.modules():
        for name in ("_modules", "_parameters", "_buffers"):
            entries.append((each.__dict__, name, each.__dict__[name]))
            entries += [(each.__dict__[name], key, value) for key, value in each.__dict__[name].items()]
    check: IdentityCheck = checks.IdentityCheck(entries)
    return check


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False))


def test_holds_until_a_parameter_is_replaced(checks: ModuleType, model: nn.Module) -> None:
    check, weight = check_of(checks, model), model[0].weight
    assert check() is True
    weight.data = torch.ones(2, 2)
    assert check() is True, "the same object, elsewhere: that is for the other check"
    model[0].weight = nn.Parameter(weight.detach())
    assert check() is False
    model[0].weight = weight
    assert check() is True


def test_replaced_submodule(checks: ModuleType, model: nn.Module) -> None:
    check = check_of(checks, model)
    model[0] = nn.Linear(2, 2)
    assert not check()


def test_replaced_dict(checks: ModuleType, model: nn.Module) -> None:
    check = check_of(checks, model)
    model[0]._parameters = dict(model[0]._parameters)
    assert not check()


def test_assigned_state_dict(checks: ModuleType, model: nn.Module) -> None:
    check = check_of(checks, model)
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    assert check()
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    assert not check()


@pytest.mark.parametrize("expected", [None, torch.ones(1), 7, "text"])
def test_deleted_key(checks: ModuleType, expected: object) -> None:
    holder = {"key": expected}
    check = checks.IdentityCheck([(holder, "key", expected)])
    assert check()
    del holder["key"]
    assert not check()


def test_equal_is_not_identical(checks: ModuleType) -> None:
    holder: dict[Any, Any] = {"key": (1, 2), 3: [1]}
    check = checks.IdentityCheck([(holder, "key", holder["key"]), (holder, 3, holder[3])])
    assert check()
    holder[3] = [1]
    assert not check()


def test_wrong_from_the_start(checks: ModuleType) -> None:
    assert not checks.IdentityCheck([({"key": 1}, "key", None)])()
    assert not checks.IdentityCheck([({}, "key", None)])()
    assert checks.IdentityCheck([])()


def test_neither_model_nor_parameters_are_kept_alive_by_refcounts(checks: ModuleType) -> None:
    model: nn.Module = nn.Linear(2, 2)
    check = checks.IdentityCheck([(model._parameters, "weight", model.weight)])
    old, of_model = weakref.ref(model.weight), weakref.ref(model)
    gc.disable()
    try:
        model.weight = nn.Parameter(torch.ones(2, 2))
        assert old() is None, "a replaced parameter gives its memory back at once"
        assert not check()
        bias = weakref.ref(model.bias)
        del model
        assert of_model() is None
        assert bias() is not None, "held by the dict, which the check holds"
        check.clear()
        assert bias() is None
    finally:
        gc.enable()
    assert not check()
    check.clear()


def test_dead_object_never_matches(checks: ModuleType) -> None:
    """Neither what is put in its place, nor an object that gets its address."""
    holder: dict[str, Any] = {"key": nn.Parameter(torch.ones(1))}
    check = checks.IdentityCheck([(holder, "key", holder["key"])])
    canonical = weakref.ref(holder["key"])
    for _ in range(50):
        holder["key"] = None
        assert not check()
        holder["key"] = canonical
        assert not check()
        holder["key"] = nn.Parameter(torch.ones(1))
        assert not check()


def test_cycle_through_a_module_is_collected(checks: ModuleType) -> None:
    model = nn.Linear(2, 2)
    model.check = checks.IdentityCheck([(model.__dict__, "training", True), (model._parameters, "bias", model.bias)])
    assert model.check()
    refs = weakref.ref(model), weakref.ref(model.bias)
    del model
    gc.collect()
    assert [ref() for ref in refs] == [None, None]


def test_references_are_returned(checks: ModuleType) -> None:
    holder, key, strong = {"some key": None}, "some key", (1, 2)
    holder[key] = strong
    count = [sys.getrefcount(each) for each in (holder, strong, checks.IdentityCheck)]
    for _ in range(1000):
        check = checks.IdentityCheck([(holder, key, strong)])
        assert check()
        with pytest.raises(TypeError):
            checks.IdentityCheck([(holder, key, strong), (holder, [], strong)])
    del check
    gc.collect()
    after = [sys.getrefcount(each) for each in (holder, strong, checks.IdentityCheck)]
    assert all(abs(now - then) < 100 for now, then in zip(after, count, strict=True))


class Unfriendly:
    """A key that, once compared, raises or lets the check go in the middle of its work."""

    def __init__(self) -> None:
        self.action = lambda: None

    def __hash__(self) -> int:
        return 1

    def __eq__(self, other: object) -> bool:
        self.action()
        return False


def test_keys_that_run_code(checks: ModuleType) -> None:
    stored = Unfriendly()
    holder = {stored: 1}
    other: dict[str, object] = {"key": torch.ones(1)}
    check = checks.IdentityCheck([(holder, Unfriendly(), 1), (other, "key", other["key"])])
    assert not check()
    stored.action = lambda: 1 / 0
    assert not check()
    stored.action = check.clear
    assert not check()
    assert not check()


def test_refuses(checks: ModuleType) -> None:
    for entry in [(1, "key", None), ({}, "key"), [{}, "key", None], None]:
        with pytest.raises(TypeError, match="entry 1: expected a tuple"):
            checks.IdentityCheck([({}, "key", None), entry])
    with pytest.raises(TypeError, match="unhashable"):
        checks.IdentityCheck([({}, [], None)])
    with pytest.raises(TypeError):
        checks.IdentityCheck([])(1)
