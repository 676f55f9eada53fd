"""guards="full" where writes to modules are told of: nothing is overlooked, and little is evaluated."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcap
from graphcap import native
from graphcap.compiler.frontend.guards import Guards
from graphcap.compiler.frontend.watched_function import WatchedFunction
from graphcap.native import fallback
from tests.compiler.frontend.calls import assert_right, rows, target_of
from tests.native.conftest import built

FACTOR = 2.0
OFFSET = torch.ones(4)

pytestmark = pytest.mark.usefixtures("graphs", "watching", "all_guards", "_no_grad")


@pytest.fixture(params=["python", "extension"])
def watching(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """State is watched as if the extension were there, by the check in Python of the same contract; and by it."""
    checks: Any = fallback
    if request.param == "extension":
        checks = built() if sys.version_info >= (3, 12) else "dicts cannot be watched before Python 3.12"
        if isinstance(checks, str):
            pytest.skip(checks)
    monkeypatch.setattr(native, "status", lambda: "extension")
    monkeypatch.setattr(native, "tells_of_writes", lambda: True)
    monkeypatch.setattr(native, "state_check", checks.StateCheck)


@pytest.fixture
def all_guards() -> Iterator[None]:
    """Torch 2.11 and older skip the guards on a module where its dicts are unchanged, and miss some changes so. Here it
    must not: what evaluates all guards has to find what the tests change."""
    config: Any = torch._dynamo.config
    skips = ("use_recursive_dict_tags_for_guards", "skip_tensor_guards_with_matching_dict_tags")
    with config.patch({name: False for name in skips if hasattr(config, name)}):
        yield


@pytest.fixture
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture
def evaluations(answers_of: Callable[[type], list[bool]]) -> list[bool]:
    """What all guards of a graph said, each time that they were evaluated."""
    return answers_of(Guards)


class Options:
    def __init__(self) -> None:
        self.bias = 1.0
        self.kinds = ["plain"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("shift", torch.randn(4))
        self.plain = torch.randn(4)
        self.scale = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return (self.drop(self.fc(x)) + self.shift + self.plain) * self.scale * FACTOR


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.gain = nn.Parameter(torch.randn(4))
        self.power = 1.0
        self.options = Options()
        self.table = {"a": 1.0}
        self.order = [0, 1]

    @property
    def doubled(self) -> float:
        return self.power * 2

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        for index in self.order:
            x = self.blocks[index](x)
        for block in self.blocks:
            x = x + block.shift
        x = x * self.gain * self.doubled * self.options.bias * self.table["a"] + OFFSET
        if self.options.kinds[0] != "plain" or "b" in self.table or hasattr(self, "extra"):
            x = -x
        x = shifted(x)
        return x if bias is None else x + bias


def shifted(x: Tensor, by: float = 1.0) -> Tensor:
    return x + by


def warm(model: nn.Module | None = None) -> Any:
    """A compiled model whose state is watched."""
    model = graphcap.compile((model or Model()).eval())
    for size in (3, 5, 3, 5):
        assert_right(model, rows(size))
    return model


def assert_watched(model: Any, evaluations: list[bool]) -> None:
    """Calls like earlier ones are right, and their guards on modules are not evaluated."""
    for size in (3, 5):
        assert_right(model, rows(size))
    known, count = len(evaluations), target_of(model).direct.count
    for size in (3, 5, 5, 3):
        assert_right(model, rows(size))
    assert len(evaluations) == known
    assert target_of(model).direct.count == count + 4


def test_what_nobody_writes_to_is_not_evaluated(evaluations: list[bool]) -> None:
    model = warm()
    assert_watched(model, evaluations)
    (way,) = target_of(model).direct._ways
    assert isinstance(way.quick, WatchedFunction)
    assert not graphcap.explain(model).unchecked_guards, "all guards are checked"


def _attribute(model: Any) -> None:
    model.blocks[1].scale = 3.0


def _own_attribute(model: Any) -> None:
    model.power = 3.0


def _eval(model: Any) -> None:
    model.blocks[0].train()


def _hook(model: Any) -> None:
    model.blocks[0].register_forward_hook(lambda module, args, output: output + 1)


def _parameter(model: Any) -> None:
    model.blocks[0].fc.weight = nn.Parameter(torch.randn(4, 4))


def _bias(model: Any) -> None:
    model.blocks[0].fc.bias = None


def _buffer(model: Any) -> None:
    model.blocks[1].shift = torch.randn(4)


def _plain(model: Any) -> None:
    model.blocks[1].plain = torch.randn(4)


def _module(model: Any) -> None:
    model.blocks[0] = Block().eval()


def _adapter(model: Any) -> None:
    model.blocks[0].fc = nn.Sequential(model.blocks[0].fc, nn.Linear(4, 4))


def _swapped(model: Any) -> None:
    first, second = model.blocks
    model.blocks[0], model.blocks[1] = second, first


def _added(model: Any) -> None:
    model.blocks.append(Block().eval())


def _removed(model: Any) -> None:
    del model.blocks[1]
    model.order = [0]


def _reordered(model: Any) -> None:
    held = model.blocks._modules
    held["0"] = held.pop("0")


def _assigned(model: Any) -> None:
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()}, assign=True)


def _written(model: Any) -> None:
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})


def _data(model: Any) -> None:
    model.blocks[0].fc.weight.data = torch.randn(8, 4)[::2]


def _class(model: Any) -> None:
    model.blocks[0].fc.__class__ = type("Other", (nn.Linear,), {"forward": lambda self, x: x * 2})


def _patched(model: Any) -> None:
    model.blocks[0].forward = lambda x: x + 7


def _dict(model: Any) -> None:
    model.blocks[0].__dict__ = {**vars(model.blocks[0]), "scale": 5.0}


def _of_an_object(model: Any) -> None:
    model.options.bias = 5.0


def _list(model: Any) -> None:
    model.order.reverse()


def _list_of_an_object(model: Any) -> None:
    model.options.kinds[0] = "other"


def _item(model: Any) -> None:
    model.table["a"] = 4.0


def _key(model: Any) -> None:
    model.table["b"] = 4.0


def _extra(model: Any) -> None:
    model.extra = True


def _global(model: Any) -> None:
    global FACTOR
    FACTOR = 3.0


def _global_tensor(model: Any) -> None:
    global OFFSET
    OFFSET = torch.randn(4)


def _function(model: Any) -> None:
    global shifted
    shifted = lambda x: x * 5.0  # noqa: E731


def _code(model: Any) -> None:
    shifted.__code__ = (lambda x, by=1.0: x - by).__code__


def _defaults(model: Any) -> None:
    shifted.__defaults__ = (4.0,)


def _function_of_torch(model: Any) -> None:
    torch.nn.functional.linear = lambda x, weight, bias=None: x * 3.0


@pytest.fixture(autouse=True)
def _globals_as_before() -> Any:
    global FACTOR, OFFSET, shifted
    before, linear = (FACTOR, OFFSET, shifted), torch.nn.functional.linear
    code, defaults = shifted.__code__, shifted.__defaults__
    yield
    FACTOR, OFFSET, shifted = before
    shifted.__code__, shifted.__defaults__ = code, defaults
    torch.nn.functional.linear = linear


CHANGES = [
    _attribute, _own_attribute, _eval, _hook, _parameter, _bias, _buffer, _plain, _module, _adapter, _swapped, _added,
    _removed, _reordered, _assigned, _written, _data, _class, _patched, _dict, _of_an_object, _list,
    _list_of_an_object, _item, _key, _extra, _global, _global_tensor, _function, _code, _defaults,
    _function_of_torch,
]  # fmt: skip


def _guards_defaults() -> bool:
    def call(x: Tensor) -> Tensor:
        return shifted(x)

    compiled = torch.compile(call, backend="eager")
    shifted.__defaults__ = (1.0,)
    before = compiled(torch.zeros(1))
    shifted.__defaults__ = (4.0,)
    return bool(compiled(torch.zeros(1)) != before)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__[1:])
def test_every_change_is_seen_at_once(change: Callable[[Any], None], evaluations: list[bool]) -> None:
    model = warm()
    assert_watched(model, evaluations)
    change(model)
    if change is _defaults and not _guards_defaults():
        pytest.skip("this torch does not guard the defaults of functions")
    torch.manual_seed(0)  # for the dropout
    for size in (3, 5, 3):
        x = rows(size)
        with graphcap.disabled(), torch.random.fork_rng():
            expected = model(x)
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


def test_a_change_and_back(evaluations: list[bool]) -> None:
    model = warm()
    model.blocks[0].scale = 4.0
    assert_right(model, rows())
    model.blocks[0].scale = 2.0
    assert_right(model, rows())
    assert_watched(model, evaluations)


def test_another_dtype(evaluations: list[bool]) -> None:
    """``to`` sets ``data`` and writes to no dict of a module without buffers."""
    model: Any = graphcap.compile(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).eval())
    for _ in range(3):
        assert_right(model, rows())
    model.to(torch.float64)
    assert_right(model, rows().double())
    with pytest.raises(RuntimeError, match="dtype"):
        model(rows())


def test_a_mark_on_a_parameter(evaluations: list[bool]) -> None:
    model = warm()
    assert_watched(model, evaluations)
    known = len(evaluations)
    torch._dynamo.maybe_mark_dynamic(model.gain, 0)
    assert_right(model, rows())
    assert len(evaluations) == known + 1, "Dynamo has guards against marks"


def test_an_argument_that_is_a_tensor_of_the_model(graphs: list[Any], evaluations: list[bool]) -> None:
    model = warm()
    for _ in range(3):
        assert_right(model, rows(), torch.randn(4))
    num_graphs = len(graphs)
    assert_right(model, rows(), model.blocks[0].shift)
    assert len(graphs) == num_graphs + 1, "the trace took them for two tensors"
    assert_right(model, rows(), torch.randn(4))


def test_writes_that_matter_to_nobody(evaluations: list[bool]) -> None:
    model = warm()
    assert_watched(model, evaluations)
    known = len(evaluations)
    for step in range(3):
        model.blocks[0].num_calls = step  # Dynamo asks only whether some names are there
        model.blocks[0].fc.weight.mul_(0.5)
        assert_right(model, rows())
    assert len(evaluations) <= known + 1, "the first of these added an attribute"


def test_what_changes_on_every_call_is_no_longer_watched(evaluations: list[bool]) -> None:
    """To prove takes longer than to evaluate guards."""
    model = warm()
    (way,) = target_of(model).direct._ways
    assert isinstance(way.quick, WatchedFunction)
    for _ in range(8):
        model.blocks[0].plain = torch.randn(4)
        assert_right(model, rows())
    known = len(evaluations)
    model.blocks[0].plain = torch.randn(4)
    assert_right(model, rows())
    assert_right(model, rows())
    assert len(evaluations) == known + 2


def test_where_nobody_tells_of_writes_after_all(monkeypatch: pytest.MonkeyPatch, evaluations: list[bool]) -> None:
    """To some dicts of Python 3.13, for example. That is found out once."""
    asked = []
    monkeypatch.setattr(native, "state_check", lambda *state: asked.append(state))
    model = warm()
    known = len(evaluations)
    for _ in range(3):
        assert_right(model, rows())
    assert len(evaluations) == known + 3
    assert len(asked) == 1


def test_two_models_of_a_class(evaluations: list[bool]) -> None:
    first, second = warm(), warm()
    first.blocks[0].scale = 5.0
    assert_right(first, rows())
    assert_watched(second, evaluations)
    assert_watched(first, evaluations)


def test_inference_mode_and_back(evaluations: list[bool]) -> None:
    model = warm()
    for _ in range(2):
        with torch.inference_mode():
            for size in (3, 5, 3):
                assert_right(model, rows(size))
        assert_right(model, rows())


def test_settings_of_torch_are_guarded(graphs: list[Any]) -> None:
    model = warm()
    num_graphs = len(graphs)
    torch.set_default_dtype(torch.float64)
    try:
        x = torch.randn(3, 4, dtype=torch.float32)
        assert_right(model, x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(graphs) == num_graphs + 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.blocks[0].fc(x).dtype == torch.bfloat16
        assert_right(model, x)
    assert len(graphs) == num_graphs + 2


def test_a_dead_model_is_gone() -> None:
    if native.state_check is fallback.StateCheck:
        pytest.skip("the check in Python keeps it alive")
    model = warm()
    gone = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_a_reset_of_dynamo(evaluations: list[bool]) -> None:
    model = warm()
    torch._dynamo.reset()
    assert_right(model, rows())
    assert_watched(model, evaluations)
