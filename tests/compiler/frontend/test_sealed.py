"""guards="sealed": arguments decide on every call, modules are looked at on every call, and the rest now and then."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcap
from graphcap import GuardError, native
from graphcap.compiler import backend
from graphcap.compiler.frontend import target as targets
from graphcap.compiler.frontend.guards import Guards
from graphcap.compiler.frontend.seal import EVERY
from tests.compiler.frontend.calls import assert_right, eager, rows, target_of

FACTOR = 2.0
OFFSET = torch.ones(4)

pytestmark = pytest.mark.usefixtures("graphs", "proving")


@pytest.fixture
def proving(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seals are used as if the extension were there; the checks are those in Python, of the same contract."""
    monkeypatch.setattr(native, "status", lambda: "extension")


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture
def evaluations(answers_of: Callable[[type], list[bool]]) -> list[bool]:
    """What all guards of a graph said, each time that they were evaluated."""
    return answers_of(Guards)


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
        self.own = torch.randn(4)
        self.power = 1.0

    def forward(self, x: Tensor, bias: Tensor | None = None, times: int = 1, cache: Any = None) -> Tensor:
        for block in self.blocks:
            x = block(x)
        x = x * self.gain * self.own * self.power * times
        if cache is not None:
            x = x + cache.total * cache.length
        return x if bias is None else x + bias


class WithGlobal(Model):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + OFFSET


class Cache:
    def __init__(self) -> None:
        self.total = torch.ones(4)
        self.length = 3


def assert_direct(compiled: Any, *args: Any, **kwargs: Any) -> None:
    """This call goes around Dynamo, and is right."""
    before = target_of(compiled).direct.count
    assert_right(compiled, *args, **kwargs)
    assert target_of(compiled).direct.count == before + 1


def warm(model: nn.Module | None = None, **settings: Any) -> Any:
    """A compiled model whose state is sealed."""
    model = graphcap.compile((model or Model()).eval(), guards="sealed", **settings)
    for size in (3, 5, 1, 3):
        assert_right(model, rows(size))
    assert target_of(model).unchecked_guards()
    return model


def test_all_guards_are_evaluated_at_the_first_and_every_256th_call(evaluations: list[bool]) -> None:
    model = graphcap.compile(Model().eval(), guards="sealed")
    model(rows())
    x = rows()
    for _ in range(3 * EVERY):
        model(x)
    assert evaluations == [True] * 3
    assert target_of(model).direct.count == 3 * EVERY
    assert_direct(model, x)


def test_full_guards_stay_the_default(evaluations: list[bool]) -> None:
    model = graphcap.compile(Model().eval())
    for _ in range(5):
        model(rows())
    assert evaluations == [True] * 4
    assert target_of(model).unchecked_guards() == []


# Changes that are noticed at once.


def _training(model: Model) -> None:
    model.train()


def _training_of_one(model: Model) -> None:
    model.blocks[1].drop.train()


def _training_of_the_root(model: Model) -> None:
    model.training = True


def _hook(model: Model) -> None:
    model.blocks[0].register_forward_hook(lambda module, args, output: output + 1)


def _hook_of_the_root(model: Model) -> None:
    model.register_forward_pre_hook(lambda module, args: (args[0] + 1, *args[1:]))


def _forward(model: Model) -> None:
    model.blocks[0].forward = lambda x: x - 1


def _forward_of_the_root(model: Model) -> None:
    model.forward = lambda x: x - 1


class Adapter(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.down, self.up = nn.Linear(4, 2), nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.up(self.down(x))


def _adapter(model: Model) -> None:
    model.blocks[1].fc = Adapter(model.blocks[1].fc)


def _grown(model: Model) -> None:
    model.blocks.append(Block().eval())


def _shrunk(model: Model) -> None:
    del model.blocks[1]


def _parameter(model: Model) -> None:
    model.blocks[0].fc.weight = nn.Parameter(torch.randn(4, 4))


def _parameter_of_the_root(model: Model) -> None:
    model.gain = nn.Parameter(torch.randn(4))


def _no_bias(model: Model) -> None:
    model.blocks[0].fc.bias = None


def _buffer(model: Model) -> None:
    model.blocks[1].shift = torch.randn(4)


def _buffer_of_another_dtype(model: Model) -> None:
    model.blocks[1].shift = torch.randn(4).double()


def _plain_tensor(model: Model) -> None:
    model.blocks[1].plain = torch.randn(4)


def _plain_tensor_of_the_root(model: Model) -> None:
    model.own = torch.randn(4).double()


def _dict_of_parameters(model: Model) -> None:
    fc = model.blocks[1].fc
    fc._parameters = {name: nn.Parameter(torch.randn_like(p)) for name, p in fc._parameters.items()}


def _dict_of_submodules_of_the_root(model: Model) -> None:
    model._modules = {"blocks": nn.ModuleList([Block().eval()])}


def _in_place(model: Model) -> None:
    model.blocks[0].fc.weight.mul_(2)


def _data(model: Model) -> None:
    model.blocks[0].fc.weight.data = torch.randn(4, 4)


TRACED_ANEW = [
    _training,
    _training_of_one,
    _hook,
    _hook_of_the_root,
    _forward,
    _forward_of_the_root,
    _adapter,
    _grown,
    _shrunk,
    _no_bias,
    _buffer_of_another_dtype,
    _plain_tensor_of_the_root,
    _dict_of_submodules_of_the_root,
]
FETCHED_ANEW = [
    _training_of_the_root,
    _parameter,
    _parameter_of_the_root,
    _buffer,
    _plain_tensor,
    _dict_of_parameters,
    _in_place,
    _data,
]


@pytest.mark.parametrize("change", TRACED_ANEW + FETCHED_ANEW)
def test_noticed_at_once(change: Callable[[Any], None], graphs: list[Any]) -> None:
    model = warm()
    change(model)
    for size in (3, 2):
        x = rows(size)
        torch.manual_seed(0)
        expected = eager(model, x)
        torch.manual_seed(0)
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    assert len(graphs) == (2 if change in TRACED_ANEW else 1)


def test_a_global_tensor_is_guarded_on_every_call(monkeypatch: pytest.MonkeyPatch, graphs: list[Any]) -> None:
    model = warm(WithGlobal())
    monkeypatch.setitem(globals(), "OFFSET", torch.randn(4))
    assert_direct(model, rows())
    assert len(graphs) == 1
    monkeypatch.setitem(globals(), "OFFSET", torch.randn(4).double())
    assert_right(model, rows())
    assert len(graphs) == 2, "the graph was made for another dtype"


def test_a_removed_hook_is_noticed_at_once() -> None:
    model = Model()
    handle = model.blocks[0].register_forward_hook(lambda module, args, output: output + 1)
    warm(model)
    handle.remove()
    assert_right(model, rows())


def test_training_and_back_is_no_error() -> None:
    model = warm()
    for _ in range(3):
        model.train()
        model(rows())
        model.eval()
        for _ in range(3):
            assert_direct(model, rows())


def test_replaced_parameters_are_sealed_anew(evaluations: list[bool]) -> None:
    model = warm()
    _parameter(model)
    del evaluations[:]
    for _ in range(10):
        assert_direct(model, rows())
    assert evaluations == [True]


def test_parameters_that_change_all_the_time_are_fetched(evaluations: list[bool]) -> None:
    model = warm()
    for _ in range(10):
        _parameter(model)
        assert_direct(model, rows())
    del evaluations[:]
    for _ in range(3):
        assert_direct(model, rows())
    assert evaluations == [True] * 3


# Changes that are found later.


def _attribute(model: Model) -> None:
    model.blocks[1].scale = 5.0


def _attribute_of_the_root(model: Model) -> None:
    model.power = 3.0


def _global(model: Model) -> None:
    globals()["FACTOR"] = 3.0


LATER = [(_attribute, "scale == 2.0"), (_attribute_of_the_root, "power == 1.0"), (_global, "FACTOR == 2.0")]


@pytest.mark.parametrize(("change", "guard"), LATER)
def test_found_at_the_256th_call(
    change: Callable[[Any], None], guard: str, monkeypatch: pytest.MonkeyPatch, graphs: list[Any]
) -> None:
    monkeypatch.setitem(globals(), "FACTOR", FACTOR)
    model, x = warm(), rows()
    change(model)
    for _ in range(target_of(model).direct.count, EVERY):  # the first direct call looked at everything
        model(x)
    with pytest.raises(GuardError, match=re.escape(guard)) as raised:
        model(x)
    assert "Model.forward" in str(raised.value)
    assert "guards='full'" in str(raised.value)
    assert len(graphs) == 1
    assert_right(model, x)
    assert len(graphs) == 2, "the next call is traced anew"
    assert_direct(model, x)


@pytest.mark.parametrize(("change", "guard"), LATER)
def test_found_when_a_plan_was_made(change: Callable[[Any], None], guard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "FACTOR", FACTOR)
    monkeypatch.setattr(targets, "backend", lambda: backend.graphcap)
    model = warm(compiler="eager", simulate=True, capture_sizes=[7])
    model(rows(7))
    change(model)
    model(rows(7))
    (region,) = graphcap.explain(model).regions
    assert (7,) in [plan.key for plan in region.plans]
    with pytest.raises(GuardError, match=re.escape(guard)):
        model(rows())


def test_changed_and_changed_back_is_no_error() -> None:
    model, x = warm(), rows()
    model.power = 3.0
    model(x)
    model.power = 1.0
    for _ in range(EVERY + 1):
        model(x)
    assert_direct(model, x)


def test_attributes_that_nothing_depends_on() -> None:
    """A counter that the caller keeps on a module costs nothing and is no error."""
    model, x = warm(), rows()
    for number in range(EVERY + 1):
        model.blocks[0].num_calls = number
        model(x)
    assert_direct(model, x)


# Arguments.


class Other:
    total = torch.ones(4) * 5
    length = 1


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((rows().double(),), {}),
        ((rows()[None],), {}),
        ((rows(6)[::2],), {}),
        ((torch.randn(4, 3).t(),), {}),
        ((rows(), rows()), {}),
        ((rows(), None, 2), {}),
        ((rows(),), {"bias": rows()}),
        ((rows(),), {"times": 3}),
        ((), {"x": rows()}),
        ((rows(), None, True), {}),
        ((nn.Parameter(rows()),), {}),
        ((rows(),), {"cache": Cache()}),
        ((rows(),), {"cache": Other()}),
    ],
)
def test_other_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    model = warm()
    for _ in range(2):
        try:
            expected = eager(model, *args, **kwargs)
        except RuntimeError:
            with pytest.raises(RuntimeError):
                model(*args, **kwargs)
        else:
            torch.testing.assert_close(model(*args, **kwargs), expected)
        assert_direct(model, rows())


def test_what_an_argument_holds() -> None:
    model, cache = warm(), Cache()
    for _ in range(3):
        assert_right(model, rows(), cache=cache)
    assert_direct(model, rows(), cache=cache)
    cache.length = 5
    assert_right(model, rows(), cache=cache)
    cache.total = torch.ones(4).double()
    assert_right(model, rows(), cache=cache)


def test_modes() -> None:
    model, x = warm(), rows()
    with torch.enable_grad():
        got = model(x)
        assert got.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x), eager(model, x))
    assert_direct(model, x)
    with torch.inference_mode():
        for _ in range(3):
            assert_right(model, x)
            assert model(x).is_inference()
    assert_direct(model, x)
    assert not model(x).is_inference()


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.randn(3, 4)

    def forward(self) -> Tensor:
        return self.table + 1


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Table()

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 + self.inner().sum(0)


def test_an_argument_that_is_a_tensor_of_the_model(evaluations: list[bool], graphs: list[Any]) -> None:
    """The graph was traced for two tensors. Whether it serves one that is both is for all guards to say."""
    model = graphcap.compile(Lookup().eval(), guards="sealed")
    for _ in range(3):
        assert_right(model, rows())
    del evaluations[:]
    assert_direct(model, rows())
    assert evaluations == []
    assert_right(model, model.inner.table)
    assert evaluations[0] is False
    if not torch.__version__.startswith("2.11"):  # whose Dynamo serves both with one graph, which is right here
        assert len(graphs) == 2
    assert_direct(model, rows())


def test_the_same_tensor_twice() -> None:
    model, x = warm(), rows()
    assert_right(model, rows(), rows())
    assert_direct(model, rows(), rows())
    assert_right(model, x, x)


# Other targets.


def test_closures_and_globals(graphs: list[Any]) -> None:
    inner, offset = Block().eval(), torch.randn(4)

    def through_a_cell(x: Tensor) -> Tensor:
        return inner(x) + offset

    compiled = graphcap.compile(through_a_cell, guards="sealed")
    for _ in range(3):
        compiled(rows())
    assert_direct(compiled, rows())
    assert target_of(compiled).unchecked_guards()
    inner.shift = torch.randn(4)
    assert_direct(compiled, rows())
    inner.drop.train()
    x = rows()
    torch.manual_seed(0)
    got = compiled(x)
    torch.manual_seed(0)
    torch.testing.assert_close(got, through_a_cell(x))
    inner, offset = Block().eval(), torch.randn(4)
    assert_right(compiled, rows())
    num_graphs = len(graphs)
    offset = torch.randn(4).double()
    assert_right(compiled, rows())
    assert len(graphs) == num_graphs + 1


def test_a_module_without_tensors_is_one_that_may_be_replaced() -> None:
    act: nn.Module = nn.ReLU()

    def run(x: Tensor) -> Tensor:
        return act(x) + 1

    compiled = graphcap.compile(run, guards="sealed")
    for _ in range(3):
        assert_right(compiled, rows())
    act = nn.Sigmoid()
    assert_right(compiled, rows())


def test_a_bound_method_and_every_kind_of_parameter() -> None:
    class Stepper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def step(self, x: Tensor, /, times: int = 1, *rest: Tensor, extra: Tensor, **more: Tensor) -> Tensor:
            for _ in range(times):
                x = self.block(x)
            return x + sum(rest) + extra + more.get("last", 0)

    stepper = Stepper().eval()
    compiled = graphcap.compile(stepper.step, guards="sealed")
    calls: list[Callable[[Any], Any]] = [
        lambda f: f(x, extra=x),
        lambda f: f(x, 2, x, x, extra=x, last=x),
        lambda f: f(x, times=2, extra=x),
    ]
    x = rows()
    for call in calls * 3:
        torch.testing.assert_close(call(compiled), call(stepper.step))
    assert target_of(compiled).unchecked_guards()
    stepper.block.shift = torch.randn(4)
    for call in calls:
        torch.testing.assert_close(call(compiled), call(stepper.step))


class Plain:
    """An object that is no module: what it holds is guarded on every call."""

    def __init__(self) -> None:
        self.block = Block().eval()
        self.scale = 2.0

    def run(self, x: Tensor) -> Tensor:
        return self.block(x) * self.scale


def test_a_method_of_an_object_that_is_no_module() -> None:
    plain = Plain()
    compiled = graphcap.compile(plain.run, guards="sealed")
    for _ in range(3):
        assert_right(compiled, rows())
    plain.scale = 3.0
    assert_right(compiled, rows())
    plain.block.scale = 3.0
    assert_right(compiled, rows())


# What is told, and lifetimes.


def test_unchecked_guards_and_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "backend", lambda: backend.graphcap)
    model = warm(compiler="eager")
    unchecked = target_of(model).unchecked_guards()
    assert any("scale == 2.0" in guard for guard in unchecked)
    assert any("FACTOR" in guard for guard in unchecked)
    conditions = [guard.split(" # ")[0] for guard in unchecked]
    assert [guard for guard in conditions if "L['args']" in guard or ".training" in guard] == []
    assert graphcap.explain(model).unchecked_guards == tuple(unchecked)
    text = str(graphcap.explain(model))
    assert f"{len(unchecked)} guards are not evaluated on every call" in text
    assert "scale == 2.0" in text


def test_without_the_extension_nothing_is_left_out(monkeypatch: pytest.MonkeyPatch, evaluations: list[bool]) -> None:
    monkeypatch.setattr(native, "status", lambda: "python: a test")
    model = graphcap.compile(Model().eval(), guards="sealed")
    for _ in range(4):
        model(rows())
    assert evaluations == [True] * 3
    assert target_of(model).unchecked_guards() == []
    _attribute(model)
    assert_right(model, rows())


def test_a_torch_whose_guards_cannot_be_split(monkeypatch: pytest.MonkeyPatch, evaluations: list[bool]) -> None:
    monkeypatch.setattr(Guards, "of_arguments", lambda self, **kinds: None)
    model = graphcap.compile(Model().eval(), guards="sealed")
    for _ in range(4):
        model(rows())
    assert evaluations == [True] * 3


def test_what_dynamo_forgets_is_not_used(graphs: list[Any]) -> None:
    model = warm()
    graph = weakref.ref(graphs.pop())
    torch._dynamo.reset()
    gc.collect()
    assert graph() is None
    assert_right(model, rows())
    assert_direct(model, rows())


def test_a_module_dies_with_its_last_reference(graphs: list[Any]) -> None:
    model = warm()
    gone = [weakref.ref(model), weakref.ref(model.gain), weakref.ref(model.blocks[0].fc.weight)]
    graphs.clear()
    gc.collect()
    gc.disable()
    try:
        del model
        assert [ref() for ref in gone] == [None, None, None]
    finally:
        gc.enable()


def test_no_argument_and_no_result_is_kept() -> None:
    model = warm()
    x = rows()
    refs = [weakref.ref(x), weakref.ref(model(x))]
    del x
    assert [ref() for ref in refs] == [None, None]


def test_a_replaced_parameter_goes_at_the_next_call() -> None:
    model = warm()
    old = weakref.ref(model.blocks[0].fc.weight)
    _parameter(model)
    model(rows())
    assert old() is None


@pytest.mark.gpu
def test_replays_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "backend", lambda: backend.graphcap)
    model = graphcap.compile(Model().eval().cuda(), compiler="eager", guards="sealed")
    for block in model.blocks:
        block.plain = block.plain.cuda()
    model.own = model.own.cuda()
    for _ in range(8):
        assert_right(model, rows().cuda())
    (region,) = graphcap.explain(model).regions
    assert region.replays >= 2
    assert target_of(model).unchecked_guards()
    model.gain = nn.Parameter(torch.randn(4, device="cuda"))
    for _ in range(4):
        assert_right(model, rows().cuda())
    model.power = 3.0
    x = rows().cuda()

    def call_until_it_is_found() -> None:
        for _ in range(EVERY):
            model(x)

    with pytest.raises(GuardError, match=re.escape("power == 1.0")):
        call_until_it_is_found()
