"""Calls around Dynamo's frame hook: guards decide as they do there, and what is not understood goes through Dynamo."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import graphcap
from graphcap import native
from graphcap.compiler import backend
from graphcap.compiler.frontend import plain_call
from graphcap.compiler.frontend import target as targets
from tests.compiler.frontend.calls import eager, rows, target_of

FACTOR = 2.0


pytestmark = pytest.mark.usefixtures("graphs")


@pytest.fixture(params=["fetched", "proved"])
def statics(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether static inputs are fetched on every call, or proved to be those of the last one."""
    monkeypatch.setattr(native, "status", lambda: "extension" if request.param == "proved" else "python: a test")
    return str(request.param)


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


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

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x * self.gain if bias is None else x * self.gain + bias


def assert_direct(compiled: Any, *args: Any, **kwargs: Any) -> None:
    """This call goes around Dynamo, and is right."""
    before = target_of(compiled).direct.count
    expected = eager(compiled, *args, **kwargs)
    torch.testing.assert_close(compiled(*args, **kwargs), expected, rtol=0, atol=0)
    assert target_of(compiled).direct.count == before + 1


def assert_through_dynamo(compiled: Any, *args: Any, **kwargs: Any) -> None:
    """This call goes through Dynamo, and is right."""
    before = target_of(compiled).direct.count
    expected = eager(compiled, *args, **kwargs)
    torch.testing.assert_close(compiled(*args, **kwargs), expected, rtol=0, atol=0)
    assert target_of(compiled).direct.count == before


def warm(model: nn.Module | None = None, **settings: Any) -> Any:
    """A compiled model whose calls are direct."""
    model = graphcap.compile((model or Model()).eval(), **settings)
    for _ in range(2):
        model(rows())
    for size in (5, 1, 3):
        assert_direct(model, rows(size))
    return model


# What changes between calls. Each of these after direct calls, and then again direct.


def _hook(model: Model) -> None:
    model.blocks[0].register_forward_hook(lambda module, args, output: output + 1)


def _pre_hook_of_the_root(model: Model) -> None:
    model.register_forward_pre_hook(lambda module, args: (args[0] + 1, *args[1:]))


def _attribute(model: Model) -> None:
    model.blocks[1].scale = 5.0


def _eps(model: Model) -> None:
    model.blocks[0].drop = nn.Identity()


def _replaced_forward(model: Model) -> None:
    model.blocks[0].forward = lambda x: x - 1


def _grown(model: Model) -> None:
    model.blocks.append(Block().eval())


GUARDED = [_hook, _pre_hook_of_the_root, _attribute, _eps, _replaced_forward, _grown]


def _parameter(model: Model) -> None:
    model.blocks[0].fc.weight = nn.Parameter(torch.randn(4, 4))


def _parameter_of_the_root(model: Model) -> None:
    model.gain = nn.Parameter(torch.randn(4))


def _buffer(model: Model) -> None:
    model.blocks[1].shift = torch.randn(4)


def _plain_attribute(model: Model) -> None:
    model.blocks[1].plain = torch.randn(4)


def _data(model: Model) -> None:
    model.blocks[0].fc.weight.data = torch.randn(4, 4)


def _in_place(model: Model) -> None:
    model.blocks[0].fc.weight.mul_(2)


def _submodule(model: Model) -> None:
    model.blocks[0].fc = nn.Linear(4, 4)


def _block(model: Model) -> None:
    model.blocks[0] = Block().eval()


def _assigned_state(model: Model) -> None:
    model.load_state_dict(Model().state_dict(), assign=True)


def _dict_of_parameters(model: Model) -> None:
    fc = model.blocks[1].fc
    fc._parameters = {name: nn.Parameter(torch.randn_like(p)) for name, p in fc._parameters.items()}


def _dict_of_submodules(model: Model) -> None:
    block = model.blocks[1]
    block._modules = {**block._modules, "fc": nn.Linear(4, 4)}


def _swapped_twins(model: Model) -> None:
    first, second = model.blocks[0], model.blocks[1]
    first.fc, second.fc = second.fc, first.fc


REPLACED = [
    _parameter,
    _parameter_of_the_root,
    _buffer,
    _plain_attribute,
    _data,
    _in_place,
    _submodule,
    _block,
    _assigned_state,
    _dict_of_parameters,
    _dict_of_submodules,
    _swapped_twins,
]


@pytest.mark.parametrize("change", GUARDED)
def test_what_guards_protect_is_traced_again(change: Callable[[Any], None], statics: str) -> None:
    model = warm()
    change(model)
    assert_through_dynamo(model, rows())
    assert_direct(model, rows())


@pytest.mark.parametrize("change", REPLACED)
def test_what_they_do_not_protect_is_fetched_anew(change: Callable[[Any], None], statics: str, graphs: Any) -> None:
    model = warm()
    for _ in range(7):
        change(model)
        assert_direct(model, rows())
        assert_direct(model, rows(2))
    assert len(graphs) == 1


def test_training_and_back() -> None:
    model = warm()
    model.train()
    torch.manual_seed(0)
    got = model(rows(3) * 0)
    torch.manual_seed(0)
    torch.testing.assert_close(got, eager(model, rows(3) * 0))
    model.eval()
    assert_direct(model, rows())


def test_a_global(monkeypatch: pytest.MonkeyPatch, statics: str) -> None:
    model = warm()
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    assert_through_dynamo(model, rows())
    assert_direct(model, rows())


@pytest.mark.parametrize("value", [rows().double(), rows().to("meta"), rows()[None], rows().to_sparse()])
def test_another_dtype_device_rank_or_layout(value: Tensor) -> None:
    model = warm()
    before = target_of(model).direct.count
    try:
        expected = eager(model, value)
    except (RuntimeError, NotImplementedError):
        with pytest.raises((RuntimeError, NotImplementedError)):
            model(value)
    else:
        torch.testing.assert_close(model(value), expected)
    assert target_of(model).direct.count == before
    assert_direct(model, rows())


def test_arguments_by_keyword_and_left_out(statics: str) -> None:
    model = warm()
    assert_through_dynamo(model, rows(), bias=rows())
    assert_direct(model, rows(), bias=rows())
    assert_direct(model, rows())
    assert_through_dynamo(model, x=rows())
    assert_direct(model, x=rows())
    assert_through_dynamo(model, rows(), None)
    with pytest.raises(TypeError):
        model(rows(), biass=rows())


@pytest.mark.parametrize(
    "mode",
    [
        torch.enable_grad,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.autocast("cpu", torch.bfloat16, enabled=False),
    ],
)
def test_modes_that_change_what_is_computed(mode: Callable[[], Any]) -> None:
    model = warm()
    with mode():
        x = rows()
        got, expected = model(x), eager(model, x)
        torch.testing.assert_close(got, expected)
        assert got.requires_grad == expected.requires_grad
    assert_direct(model, rows())


def test_inference_mode() -> None:
    model = warm()
    with torch.inference_mode():
        x = rows()
        for _ in range(2):
            torch.testing.assert_close(model(x), eager(model, x))
        assert model(x).is_inference()
        assert_direct(model, x)
    assert not model(rows()).is_inference()


# Calls that are not plain.


def test_stances() -> None:
    model = warm()
    for stance in ("force_eager", "eager_on_recompile", "fail_on_recompile"):
        with torch.compiler.set_stance(stance):
            assert_through_dynamo(model, rows())
    with torch.compiler.set_stance("default", skip_guard_eval_unsafe=True):
        assert_through_dynamo(model, rows())
    assert_direct(model, rows())


def test_a_dispatch_mode_sees_what_it_sees_through_dynamo(monkeypatch: pytest.MonkeyPatch) -> None:
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    direct = warm()
    monkeypatch.setenv("GRAPHCAP_DIRECT_CALL", "0")
    dynamo = graphcap.compile(Model().eval())
    dynamo(rows())
    seen = []
    for model in (direct, dynamo):
        names: list[str] = []
        with Names():
            model(rows())
        seen.append(names)
    assert seen[0] == seen[1]


def test_inside_of_a_jit_trace_it_is_the_error_that_it_was() -> None:
    model = warm()
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace"):
        torch.jit.trace(lambda x: model(x), rows())  # noqa: PLW0108 - it takes no compiled module


def test_inside_of_vmap(graphs: list[Any]) -> None:
    model, x = warm(), torch.randn(2, 3, 4)
    got = torch.vmap(model)(x)
    torch.testing.assert_close(got, torch.stack([eager(model, each) for each in x]))


def test_inside_of_another_compiled_function() -> None:
    model = warm()

    @torch.compile(backend="eager")
    def outer(x: Tensor) -> Tensor:
        y = model(x)
        torch._dynamo.graph_break()
        return model(y)

    before, x = target_of(model).direct.count, rows()
    torch.testing.assert_close(outer(x), eager(model, eager(model, x)))
    assert target_of(model).direct.count == before


def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHCAP_DIRECT_CALL", "0")
    model = graphcap.compile(Model().eval())
    for _ in range(3):
        assert_through_dynamo(model, rows())


# What a function may take and give.


@dataclass
class Out:
    hidden: Tensor
    extra: Any = None


class Cache:
    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.total = torch.zeros(4)
        self.length = 0


def _nested(x: Tensor) -> Any:
    return [x + 1, (x, None, 3, "text", 0.5)], {"a": x * 2, "rows": x.shape[0]}


def _of_a_dataclass(x: Tensor) -> Any:
    return Out(hidden=x + 1, extra={"x": x})


def _input_is_output(x: Tensor) -> Any:
    return x, x + 1


def _view(x: Tensor) -> Any:
    return (x + 1).view(-1), x.t()


def assert_same(got: Any, expected: Any) -> None:
    assert type(got) is type(expected)
    if isinstance(expected, Out):
        got, expected = vars(got), vars(expected)
    got, tree = torch.utils._pytree.tree_flatten(got)
    expected, expected_tree = torch.utils._pytree.tree_flatten(expected)
    assert tree == expected_tree
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.equal(mine, theirs) if isinstance(theirs, Tensor) else mine == theirs


@pytest.mark.parametrize("fn", [_nested, _of_a_dataclass, _input_is_output, _view])
def test_results(fn: Callable[..., Any]) -> None:
    compiled = graphcap.compile(fn)
    for size in (3, 3, 5, 5, 1):
        x = rows(size)
        assert_same(compiled(x), fn(x))
    assert target_of(compiled).direct.count >= 2
    first, second = compiled(x), compiled(x)
    assert first is not second
    if fn is _input_is_output:
        assert first[0] is x


def test_an_output_of_a_hugging_face_model() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")

    class Encoder(Block):
        def forward(self, x: Tensor) -> Any:
            return outputs.BaseModelOutput(last_hidden_state=super().forward(x))

    model = graphcap.compile(Encoder().eval())
    for _ in range(3):
        x = rows()
        got, expected = model(x), eager(model, x)
        assert type(got) is type(expected)
        assert list(got) == list(expected) == ["last_hidden_state"]
        assert torch.equal(got.last_hidden_state, expected["last_hidden_state"])
        assert torch.equal(got[0], expected[0])
    assert target_of(model).direct.count == 2


def test_every_kind_of_parameter() -> None:
    def many(a: Tensor, /, b: Tensor, *rest: Tensor, c: Tensor, d: float = 2.0, **more: Tensor) -> Tensor:
        return a + b * d + sum(rest) + c + more.get("e", 0)

    compiled = graphcap.compile(many, dynamic_arg_dims={"a": 0, "b": 0, "c": 0})
    x = rows()
    for call in (
        lambda f: f(x, x, c=x),
        lambda f: f(x, b=x, c=x, d=3.0),
        lambda f: f(x, x, x, x, c=x, e=x),
    ):
        for _ in range(2):
            torch.testing.assert_close(call(compiled), call(many))
        before = target_of(compiled).direct.count
        torch.testing.assert_close(call(compiled), call(many))
        assert target_of(compiled).direct.count == before + 1
    for wrong in (lambda f: f(x, c=x), lambda f: f(a=x, b=x, c=x), lambda f: f(x, x)):
        with pytest.raises(TypeError, match="many"):
            wrong(compiled)


def test_closures_and_globals(statics: str) -> None:
    inner, offset = Block().eval(), torch.randn(4)

    def through_a_cell(x: Tensor) -> Tensor:
        return inner(x) + offset

    compiled = graphcap.compile(through_a_cell)
    for _ in range(2):
        compiled(rows())
    assert_direct(compiled, rows())
    inner.fc.weight = nn.Parameter(torch.randn(4, 4))
    assert_direct(compiled, rows())
    inner, offset = Block().eval(), torch.randn(4)
    torch.testing.assert_close(compiled(x := rows()), inner(x) + offset)


def test_a_bound_method(statics: str) -> None:
    class Stepper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def step(self, x: Tensor, times: int = 1) -> Tensor:
            for _ in range(times):
                x = self.block(x)
            return x

    stepper = Stepper().eval()
    compiled = graphcap.compile(stepper.step)
    for times in (1, 2):
        for _ in range(2):
            compiled(rows(), times)
        assert_direct(compiled, rows(), times)
    stepper.block.shift = torch.randn(4)
    assert_direct(compiled, rows(), 2)


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.inner = nn.Module()
        self.inner.register_buffer("state", torch.zeros(4))
        self.register_buffer("count", torch.zeros(()))
        self.calls: list[Tensor] = []

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        y = self.fc(x)
        self.count += 1
        self.inner.state = self.inner.state + y.sum(0)
        cache.keys.append(y)
        cache.total = cache.total + y.sum(0)
        return y + self.inner.state + cache.total


def test_side_effects_happen_once_as_in_eager(statics: str) -> None:
    """A list that grows and attributes that are written: the direct way does what Dynamo's code does."""
    model, reference = Stateful(), Stateful()
    reference.load_state_dict(model.state_dict())
    graphcap.compile(model)
    for _ in range(4):
        mine, theirs = Cache(), Cache()
        for _ in range(3):
            x = rows()
            torch.testing.assert_close(model(x, mine), reference(x, theirs))
        torch.testing.assert_close(mine.keys, theirs.keys)
        torch.testing.assert_close(mine.total, theirs.total)
    torch.testing.assert_close(model.state_dict(), reference.state_dict())
    torch.testing.assert_close(model.inner.state, reference.inner.state)
    assert target_of(model).direct.count > 0


def test_errors_of_the_graph_arrive_and_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    fail = False

    def failing(gm: torch.fx.GraphModule, inputs: Any, **kwargs: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            if fail:
                torch._C._functorch._vmap_increment_nesting(2, "error")
                raise ValueError("in the graph")
            return gm.forward(*args)

        return run

    monkeypatch.setattr(targets, "backend", lambda: failing)
    model = warm()
    fail = True
    with pytest.raises(ValueError, match="in the graph"):
        model(rows())
    fail = False
    assert torch._C._functorch.get_dynamic_layer_stack_depth() == 0
    assert_direct(model, rows())


def test_a_graph_break_goes_through_dynamo_and_says_so() -> None:
    def broken(x: Tensor) -> Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    compiled = graphcap.compile(broken)
    for _ in range(3):
        assert_through_dynamo(compiled, rows())
    assert "calls go through Dynamo: there is a graph break" in target_of(compiled).notes
    assert "calls go through Dynamo: there is a graph break" in graphcap.explain(compiled).notes


def test_several_graphs_of_one_function(graphs: list[Any]) -> None:
    model = graphcap.compile(Model().eval())
    kinds: list[tuple[Any, ...]] = [(rows(),), (rows(), rows()), (torch.randn(2, 3, 4),)]
    for args in kinds:
        model(*args)
    for args in kinds * 2:
        assert_direct(model, *args)
    assert len(graphs) == 3


# Lifetimes.


@pytest.mark.parametrize("forget", [torch._dynamo.reset, lambda: None], ids=["everything", "one function"])
def test_what_dynamo_forgets_is_not_used(forget: Callable[[], None], graphs: list[Any], statics: str) -> None:
    model = warm()
    forget()
    if len(graphs) == 1 and forget is not torch._dynamo.reset:
        torch._dynamo.reset_code(target_of(model).entry.__code__)
    assert_through_dynamo(model, rows())
    assert len(graphs) == 2
    assert_direct(model, rows())


def test_a_graph_is_not_kept_alive(graphs: list[Any]) -> None:
    model = warm()
    graph = weakref.ref(graphs.pop())
    torch._dynamo.reset()
    gc.collect()
    assert graph() is None
    assert_through_dynamo(model, rows())


def test_the_death_of_what_is_guarded_by_identity() -> None:
    class Switch:
        def __call__(self, x: Tensor) -> Tensor:
            return x + 1

    model = warm()
    model.blocks[0].forward = Switch()
    for _ in range(2):
        model(rows())
    assert_direct(model, rows())
    del model.blocks[0].forward
    gc.collect()
    assert_direct(model, rows())


def test_a_module_dies_with_its_last_reference(statics: str, graphs: list[Any]) -> None:
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


def test_no_argument_and_no_result_is_kept(statics: str) -> None:
    model = warm()
    x = rows()
    refs = [weakref.ref(x), weakref.ref(model(x))]
    assert target_of(model).direct.count
    del x
    assert [ref() for ref in refs] == [None, None]


def test_a_replaced_parameter_goes_at_the_next_call(statics: str) -> None:
    model = warm()
    old = weakref.ref(model.blocks[0].fc.weight)
    model.blocks[0].fc.weight = nn.Parameter(torch.randn(4, 4))
    model(rows())
    assert old() is None


def test_threads() -> None:
    model, wrong = warm(), []

    def run() -> None:
        with torch.no_grad():
            for size in (2, 3, 5, 7) * 25:
                x = rows(size)
                if not torch.equal(model(x), eager(model, x)):
                    wrong.append(size)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_fault_of_ours_costs_nothing_but_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphcap.compiler.frontend import direct_call

    def broken(code: Any) -> Any:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(direct_call, "read", broken)
    model = graphcap.compile(Model().eval())
    for _ in range(3):
        assert_through_dynamo(model, rows())
    assert target_of(model).notes == ["calls go through Dynamo: ZeroDivisionError: a bug"]


def test_a_torch_that_does_not_tell_where_a_call_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slower, right, and said: torch 2.14 had moved a flag, and no call was direct without a word."""
    moved = [(getattr, (torch.fx._symbolic_trace, "a_flag_that_was_moved"), False)]
    monkeypatch.setattr(plain_call, "_questions", lambda: moved)
    model = graphcap.compile(nn.Linear(4, 4))
    x = torch.randn(3, 4)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(model(x), nn.functional.linear(x, model.weight, model.bias))
    target = target_of(model)
    assert target.direct.count == 0
    (note,) = target.notes
    assert "a_flag_that_was_moved" in note


def test_a_model_whose_calls_are_direct_has_no_note() -> None:
    assert target_of(warm()).notes == []


def test_a_replay_is_reached_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real backend and the simulated device: the plan is captured and replayed by direct calls."""
    monkeypatch.setattr(targets, "backend", lambda: backend.graphcap)
    model = graphcap.compile(Model().eval(), compiler="eager", simulate=True)
    for _ in range(6):
        x = rows()
        torch.testing.assert_close(model(x), eager(model, x))
    assert target_of(model).direct.count == 5
    (region,) = graphcap.explain(model).regions
    assert sum(plan.replays for plan in region.plans) >= 2
    _parameter(model)
    assert_direct(model, rows())
