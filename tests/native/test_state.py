"""StateCheck, in Python and in C++."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from graphcap.native import fallback
from tests.native.conftest import built

Holds = Callable[..., bool]


@pytest.fixture(params=["python", "extension"])
def checks(request: pytest.FixtureRequest) -> ModuleType:
    """Both implementations; the extension needs to be told of writes."""
    if request.param == "python":
        return fallback
    if sys.version_info < (3, 12):
        pytest.skip("dicts cannot be watched before Python 3.12")
    extension = built()
    if isinstance(extension, str):
        pytest.skip(extension)
    return extension


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 3)
        self.second = nn.BatchNorm1d(3)
        self.scale = 2.0


def function(x: int = 1) -> int:
    return x + 1


@pytest.fixture(autouse=True)
def _function_as_before() -> Any:
    before = function.__code__, function.__defaults__
    yield
    function.__code__, function.__defaults__ = before


@pytest.fixture
def model() -> Model:
    return Model().requires_grad_(False)


def check_of(checks: ModuleType, model: Model) -> Holds:
    """Where the submodules and their tensors are, one attribute, and the keys of every dict with parameters."""
    own = vars(model)
    entries: list[Any] = [(own, "_modules", own["_modules"]), (own, "scale", own["scale"])]
    sized, objects, tensors = [], [], []
    for name, module in model.named_children():
        entries.append((own["_modules"], name, module))
        for holder in ("_parameters", "_buffers"):
            held = vars(module)[holder]
            entries.append((vars(module), holder, held))
            entries += [(held, key, tensor) for key, tensor in held.items()]
            sized.append(held)
            tensors += [each for each in held.values() if each is not None]
        objects += [module, function]
    sized += [vars(tensor) for tensor in tensors]  # for what others note on a tensor
    check: Holds = checks.StateCheck([model], entries, sized, [model, *objects], tensors)
    return check


def test_holds_for_its_roots_only(checks: ModuleType, model: Model) -> None:
    check = check_of(checks, model)
    assert check(model) is True
    assert check(Model()) is False
    assert check() is False
    assert check(model, model) is False
    assert check(model) is True


def _replace_parameter(model: Model) -> None:
    model.first.weight = nn.Parameter(model.first.weight.detach().clone(), requires_grad=False)


def _replace_module(model: Model) -> None:
    model.first = nn.Linear(2, 3)


def _replace_and_put_back(model: Model) -> None:
    first = model.first
    model.first = nn.Linear(2, 3)
    model.first = first


def _delete(model: Model) -> None:
    del model.scale


def _set_attribute(model: Model) -> None:
    model.scale = 3.0


def _register_buffer(model: Model) -> None:
    model.second.register_buffer("another", None)


def _reorder(model: Model) -> None:
    weight = model.first._parameters.pop("weight")
    model.first._parameters["weight"] = weight


def _clear(model: Model) -> None:
    model.first._parameters.clear()


def _update(model: Model) -> None:
    vars(model).update(scale=4.0)


@pytest.mark.parametrize(
    "write",
    [
        _replace_parameter, _replace_module, _replace_and_put_back, _delete, _set_attribute, _register_buffer, _reorder,
        _clear, _update,
    ],
)  # fmt: skip
def test_a_write_breaks_it_for_ever(checks: ModuleType, model: Model, write: Callable[[Model], None]) -> None:
    check = check_of(checks, model)
    before = model.scale
    write(model)
    if write is _replace_and_put_back and checks is fallback:
        pytest.skip("what writes have left is all that Python's can see")
    assert check(model) is False
    model.scale = before
    assert check(model) is False
    assert check_of(checks, Model())(model) is False


def _move(model: Model) -> None:
    model.to(torch.float64)  # sets .data of each parameter, and writes to no dict of one without buffers


def _reshape(model: Model) -> None:
    model.first.weight.data = torch.zeros(3, 4)


def _restride(model: Model) -> None:
    model.first.weight.data = torch.zeros(2, 3).t()


def _require_grad(model: Model) -> None:
    model.first.bias.requires_grad_(True)


def _mark(model: Model) -> None:
    torch._dynamo.mark_dynamic(model.first.weight, 0)


def _change_class(model: Model) -> None:
    model.first.__class__ = type("Other", (nn.Linear,), {})


def _change_root_class(model: Model) -> None:
    model.__class__ = type("Other", (Model,), {})


def _replace_dict(model: Model) -> None:
    model.first.__dict__ = dict(vars(model.first))


def _change_code(model: Model) -> None:
    function.__code__ = (lambda x: x + 2).__code__


def _change_defaults(model: Model) -> None:
    function.__defaults__ = (2,)


def _swap(model: Model) -> None:
    torch.utils.swap_tensors(model.first.weight, nn.Parameter(torch.zeros(5), requires_grad=False))


@pytest.mark.parametrize(
    "change",
    [
        _move,
        _reshape,
        _restride,
        _require_grad,
        _mark,
        _change_class,
        _change_root_class,
        _replace_dict,
        _swap,
        _change_code,
        _change_defaults,
    ],
)  # fmt: skip
def test_another_form(checks: ModuleType, model: Model, change: Callable[[Model], None]) -> None:
    check = check_of(checks, model)
    change(model)
    assert check(model) is False


def test_what_does_not_matter(checks: ModuleType, model: Model) -> None:
    check = check_of(checks, model)
    model.other = 1  # an attribute that nobody asked about
    model.eval()
    model.scale = model.scale
    model.first.weight.add_(1)
    model.first.weight.data = torch.zeros(3, 2)
    model.load_state_dict(Model().state_dict())
    assert check(model) is True


def test_the_end_of_a_model_is_a_write(checks: ModuleType) -> None:
    """And nothing is kept alive: the extension goes by bare pointers."""
    if checks is fallback:
        pytest.skip("keeps everything alive")
    gc.disable()
    try:
        for _ in range(3):  # later ones may lie where earlier ones lay
            model = Model()
            check, gone = check_of(checks, model), weakref.ref(model)
            assert check(model)
            del model
            assert gone() is None
            assert check(Model()) is False
    finally:
        gc.enable()


def test_many_checks_of_one_model(checks: ModuleType, model: Model) -> None:
    many = [check_of(checks, model) for _ in range(3)]
    del many[1]
    assert [check(model) for check in many] == [True, True]
    model.scale = 1.0
    assert [check(model) for check in many] == [False, False]
    del many
    model.scale = 2.0
    assert check_of(checks, model)(model)


def test_what_is_refused(checks: ModuleType, model: Model) -> None:
    make: Any = checks.StateCheck
    for wrong in ([(1, "key", 2)], [({}, "key")], [7]):
        with pytest.raises(TypeError):
            make([model], wrong, [], [], [])
    with pytest.raises(TypeError):
        make([model], [], [7], [], [])
    with pytest.raises(TypeError):
        make([model], [], [], [], [model])
    assert make([model], [({}, "key", None)], [], [], [])(model) is False, "wrong from the start"
    assert make([], [], [], [], [])() is True


def test_a_dict_that_cannot_be_watched(checks: ModuleType) -> None:
    class Own(dict[str, int]):
        pass

    if checks is fallback:
        pytest.skip("watches none")
    with pytest.raises(ValueError, match="writes"):
        checks.StateCheck([], [], [Own()], [], [])
