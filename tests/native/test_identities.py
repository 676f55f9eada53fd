"""IdentityCheck, in Python and in C++."""

from __future__ import annotations

import collections
import gc
import sys
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from graphcap.native import IdentityCheck, fallback
from tests.native.conftest import built


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


def test_an_attribute_that_another_object_of_the_class_has(checks: ModuleType) -> None:
    """Such objects share their keys; Python 3.12 tells of an attribute that is replaced where it is a new one."""

    class Own:
        pass

    for _ in range(3):
        owner: Any = Own()
        check = checks.IdentityCheck([], [vars(owner)])
        assert check()
        owner.attribute = 1
        assert not check()
        del owner.attribute
        assert check()


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
    for entry in [(-1, "key", None), ("0", "key", None), ({}, "key"), [{}, "key", None], None]:
        with pytest.raises(TypeError, match="entry 1: expected a tuple"):
            checks.IdentityCheck([({}, "key", None), entry])
    with pytest.raises(TypeError, match="unhashable"):
        checks.IdentityCheck([({}, [], None)])
    with pytest.raises(TypeError):
        checks.IdentityCheck([])(1)


# Writes of every kind, each of which may have to be noticed without looking (Python 3.12 and later).


def _added(holder: dict[Any, Any]) -> None:
    holder["new"] = 1


def _popped(holder: dict[Any, Any]) -> None:
    holder.pop("key")


def _last_popped(holder: dict[Any, Any]) -> None:
    holder.popitem()


def _cleared(holder: dict[Any, Any]) -> None:
    holder.clear()


def _updated(holder: dict[Any, Any]) -> None:
    holder.update(key=2)


def _merged(holder: dict[Any, Any]) -> None:
    holder |= {"key": 2}


def _defaulted(holder: dict[Any, Any]) -> None:
    holder.setdefault("new")


def _reassigned(holder: dict[Any, Any]) -> None:
    holder["".join(["k", "ey"])] = 2


def _by_an_equal_key(holder: dict[Any, Any]) -> None:
    holder[Text("key")] = 2


class Text(str):
    """Equal to a string, and not the same."""

    __slots__ = ()


NOTICED = [_popped, _cleared, _updated, _merged, _reassigned, _by_an_equal_key]
RESIZING = [_added, _popped, _last_popped, _cleared, _defaulted]


@pytest.mark.parametrize("kind", [dict, collections.OrderedDict])
@pytest.mark.parametrize("write", NOTICED)
def test_every_way_to_replace_an_object(checks: ModuleType, write: Callable[[Any], None], kind: type[Any]) -> None:
    old = object()
    holder = kind(key=old, last=1)
    check = checks.IdentityCheck([(holder, "key", old)])
    assert check()
    assert check()
    write(holder)
    assert not check()
    assert not check()
    holder["key"] = old
    assert check()


@pytest.mark.parametrize("kind", [dict, collections.OrderedDict])
@pytest.mark.parametrize("write", RESIZING)
def test_every_way_to_change_the_number_of_keys(
    checks: ModuleType, write: Callable[[Any], None], kind: type[Any]
) -> None:
    holder = kind(key=1, last=1)
    check = checks.IdentityCheck([], [holder])
    assert check()
    assert check()
    write(holder)
    assert not check()


def test_a_subclass_that_writes_as_it_likes(checks: ModuleType) -> None:
    holder = collections.defaultdict(int, key=1)
    check = checks.IdentityCheck([(holder, "key", holder["key"])], [holder])
    assert check()
    assert holder["other"] == 0
    assert not check()


def test_writes_that_mean_nothing(checks: ModuleType) -> None:
    holder: dict[str, object] = {"key": (old := object()), "other": 1}
    check = checks.IdentityCheck([(holder, "key", old)], [holder])
    for value in range(100):
        holder["other"] = value
        holder["key"] = old
        assert check()
    holder["key"] = 1
    holder["key"] = old
    assert check()
    del holder["other"]
    holder["another"] = 1
    assert check(), "as many keys as before"


def test_attributes_of_an_object(checks: ModuleType) -> None:
    """A module's own dict, written by setattr, by del and as a dict."""
    model = nn.Linear(2, 2)
    check = checks.IdentityCheck([(model.__dict__, "training", True)], [model.__dict__])
    assert check()
    model.eval()
    assert not check()
    model.train()
    assert check()
    model.forward = lambda x: x
    assert not check()
    del model.forward
    assert check()
    vars(model).update(training=False)
    assert not check()


class Object:
    """Neither a module nor anything else that decides how its attributes are set."""

    def __init__(self) -> None:
        self.value: object = 0
        self.other = 0


def test_attributes_of_a_plain_object_in_a_loop(checks: ModuleType) -> None:
    """Often enough that Python stores them in its quickest way."""
    plain, old = Object(), object()
    for has_dict in (False, True):
        if has_dict:
            check = checks.IdentityCheck([(vars(plain), "value", old)], [vars(plain)])
        for number in range(300):
            plain.value = old
            plain.other = number
            assert not has_dict or check()
            plain.value = number
            assert not has_dict or not check()


def test_many_checks_of_one_dict(checks: ModuleType) -> None:
    holder = {"a": (a := object()), "b": (b := object())}
    both = checks.IdentityCheck([(holder, "a", a), (holder, "b", b)])
    one = checks.IdentityCheck([(holder, "a", a)])
    gone = checks.IdentityCheck([(holder, "b", b)])
    assert both()
    assert one()
    assert gone()
    gone.clear()
    holder["b"] = 1
    assert [both(), one(), gone()] == [False, True, False]
    del both, gone
    holder["a"] = 1
    assert not one()
    holder["a"], holder["b"] = a, b
    assert one()


def test_a_dict_outlives_its_checks(checks: ModuleType) -> None:
    holder = {"key": 1}
    for _ in range(100):
        assert checks.IdentityCheck([(holder, "key", 1)], [holder])()
    holder["key"] = 2
    assert not checks.IdentityCheck([(holder, "key", 1)])()


def test_refuses_sizes_of_what_is_no_dict(checks: ModuleType) -> None:
    for wrong in ([], 0, (0, []), (-1, {}), ({}, {})):
        with pytest.raises(TypeError, match="sized 1: expected a dict"):
            checks.IdentityCheck([], [{}, wrong])


def test_dicts_that_are_given_at_the_call(checks: ModuleType) -> None:
    held, own = {"a": (a := object())}, {"b": (b := object()), "other": 1}
    check = checks.IdentityCheck([(0, "b", b), (held, "a", a), (1, "c", None)], [(0, own), held])
    for _ in range(2):
        assert check(own, {"c": None})
    assert not check({**own, "b": 1}, {"c": None})
    assert check(dict(own), {"c": None}), "another dict of the same contents"
    assert not check({"b": b}, {"c": None}), "a key less"
    assert not check(own, {})
    held["new"] = 1
    assert not check(own, {"c": None})
    del held["new"]
    assert check(own, {"c": None})
    count = sys.getrefcount(own)
    check(own, {"c": None})
    assert sys.getrefcount(own) == count
    for wrong in [(), (own,), (own, own, own), (own, None)]:
        with pytest.raises(TypeError, match="takes 2 dicts"):
            check(*wrong)
    check.clear()
    assert not check(own, {"c": None})


def test_a_dict_given_at_the_call_is_not_kept(checks: ModuleType) -> None:
    model = nn.Linear(2, 2)
    check = checks.IdentityCheck([(0, "training", True), (0, "_modules", model._modules)], [(0, vars(model))])
    assert check(vars(model))
    gone = weakref.ref(model.weight)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from("abc"), st.sampled_from([None, 1, 2, 3])), max_size=12))
@settings(max_examples=60)
def test_agrees_with_a_look_at_everything(writes: list[tuple[int, str, object]]) -> None:
    """Whatever is written (``None``: deleted), the extension answers as Python does."""
    extension = built()
    if isinstance(extension, str):
        pytest.skip(extension)
    holders: list[dict[str, object]] = [{"a": 1, "b": 2}, {"a": 1}, {}]
    entries = [(holder, key, value) for holder in holders for key, value in holder.items()]
    answers = [module.IdentityCheck(entries, holders[1:]) for module in (fallback, extension)]
    for number, key, value in writes:
        if value is None:
            holders[number].pop(key, None)
        else:
            holders[number][key] = value
        assert answers[0]() == answers[1]()


@pytest.mark.skipif(sys.version_info < (3, 12), reason="dicts can be watched from Python 3.12 on")
def test_dicts_are_watched_where_they_can_be() -> None:
    extension = built()
    if isinstance(extension, str):
        pytest.skip(extension)
    model = nn.Linear(2, 2)
    entries = [(0, "training", True), (model._parameters, "bias", model.bias)]
    check = extension.IdentityCheck(entries, [model._modules, (0, vars(model))])
    assert check.is_watched
    check.clear()
    assert not check.is_watched
    # A module's own dict shares its values with the module from Python 3.13 on, and is not told of them.
    own = extension.IdentityCheck([(vars(model), "training", True)])
    assert own.is_watched == (sys.version_info < (3, 13))
    holder = collections.defaultdict(int, key=1)
    assert not extension.IdentityCheck([*entries, (holder, "key", 1)]).is_watched
    assert not extension.IdentityCheck(entries, [holder]).is_watched
