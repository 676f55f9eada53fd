"""@support_graph_compile: lazy, per instance, inherited, and invisible otherwise."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcap
from graphcap import support_graph_compile
from graphcap.compiler.frontend.api import record_of
from graphcap.compiler.frontend.disabling import is_disabled
from graphcap.compiler.frontend.target import CompiledTarget
from graphcap.errors import ConfigError, DimError

SIZES = (3, 7, 1, 2, 0)


@support_graph_compile
class Block(nn.Module):
    def __init__(self, width: int = 4, *, scale: float = 2.0) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.scale

    def generate(self, x: Tensor, num_steps: int) -> Tensor:
        for _ in range(num_steps):
            x = self(x)
        return x


class Shifted(Block):
    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        out = super().forward(x)
        return out if shift is None else out + shift


@support_graph_compile
class Stack(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def rows(num_rows: int) -> Tensor:
    return torch.randn(num_rows, 4)


def record(module: nn.Module) -> CompiledTarget:
    found = record_of(module)
    assert found is not None
    return found


def assert_same_as_eager(module: nn.Module, *args: Any) -> None:
    got = module(*args)
    with graphcap.disabled():
        torch.testing.assert_close(got, module(*args), rtol=0, atol=0)


def test_an_instance_is_compiled_at_its_first_call(graphs: list[Any]) -> None:
    block = Block()
    assert record_of(block) is None
    for size in SIZES:
        assert_same_as_eager(block, rows(size))
    assert len(graphs) == 1
    assert record(block).name == "Block.forward"


def test_every_instance_has_its_own_graph(graphs: list[Any]) -> None:
    for block in (Block(), Block(scale=3.0), Block()):
        assert_same_as_eager(block, rows(3))
    assert len(graphs) == 3


def test_the_class_stays_what_it_was(graphs: list[Any]) -> None:
    class Plain(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.fc = nn.Linear(width, width)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    before = (Plain.__name__, inspect.signature(Plain), Plain.__mro__, repr(Plain(4)), list(Plain(4).state_dict()))
    decorated = support_graph_compile(Plain)
    assert decorated is Plain
    model = Plain(4)
    model(rows(3))
    assert isinstance(model, Plain)
    assert (Plain.__name__, inspect.signature(Plain), Plain.__mro__, repr(model), list(model.state_dict())) == before


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("called", [False, True])
def test_copies_and_pickles(clone: Callable[[Any], Any], called: bool, graphs: list[Any]) -> None:
    block, x = Block(), rows(3)
    if called:
        block(x)
    twin = clone(block)
    assert torch.equal(twin(x), block(x))
    assert record(twin) is not record(block)
    assert len(graphs) == 2


def test_hooks_fire(graphs: list[Any]) -> None:
    block, x = Block(), rows(3)
    block.register_forward_hook(lambda module, args, output: output + 1)
    torch.testing.assert_close(block(x), block.fc(x) * 2 + 1)
    assert len(graphs) == 1


def test_a_method_that_calls_the_module_runs_it_compiled(graphs: list[Any]) -> None:
    Block().generate(rows(3), num_steps=4)
    assert len(graphs) == 1


@pytest.mark.parametrize("hooked", [False, True])
def test_nested_instances_become_part_of_the_outer_graph(hooked: bool, graphs: list[Any]) -> None:
    stack = Stack(depth=3)
    if hooked:
        stack.blocks[1].register_forward_hook(lambda module, args, output: output + 1)
    for size in SIZES:
        stack(rows(size))
    assert len(graphs) == 1
    assert all(record_of(block) is None for block in stack.blocks)
    assert_same_as_eager(stack, rows(3))


def test_torchs_own_compile_takes_a_decorated_instance(graphs: list[Any]) -> None:
    outer_graphs = []

    def outer_backend(gm: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        outer_graphs.append(gm)
        return gm.forward

    block, x = Block(), rows(3)
    torch.testing.assert_close(torch.compile(block, backend=outer_backend, fullgraph=True)(x), block.fc(x) * 2)
    assert (len(outer_graphs), len(graphs)) == (1, 0)

    block.compile(backend=outer_backend)
    block(x)
    assert record_of(block) is None


def test_export_sees_the_plain_module(graphs: list[Any]) -> None:
    exported = torch.export.export(Block(), (rows(3),))
    assert exported.module()(rows(3)).shape == (3, 4)
    assert not graphs


# Options.


def test_enable_if_is_asked_once_per_instance(graphs: list[Any]) -> None:
    asked = []

    @support_graph_compile(enable_if=lambda module: asked.append(module.on) or module.on)
    class Sometimes(nn.Module):
        def __init__(self, on: bool) -> None:
            super().__init__()
            self.on = on

        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    compiled, eager = Sometimes(True), Sometimes(False)
    for module in (compiled, eager, compiled, eager):
        assert_same_as_eager(module, rows(3))
    assert asked == [True, False]
    assert len(graphs) == 1
    assert record_of(eager) is None


def test_disabled_compiles_nothing(graphs: list[Any]) -> None:
    block = Block()
    with graphcap.disabled():
        block(rows(3))
    assert not graphs
    assert record_of(block) is None
    block(rows(3))
    assert len(graphs) == 1


def test_disabled_ends_with_an_error() -> None:
    with pytest.raises(ZeroDivisionError), graphcap.disabled():
        raise ZeroDivisionError
    assert not is_disabled.get()


def test_settings_and_dims() -> None:
    @support_graph_compile(dynamic_arg_dims={"x": {1: "seq"}}, config=graphcap.Config(max_plans=3), compiler="eager")
    class Wide(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    model = Wide()
    for size in SIZES:
        assert_same_as_eager(model, torch.randn(2, size))
    assert (record(model).config.max_plans, record(model).config.compiler) == (3, "eager")
    assert [tuple(dim) for dim in record(model).dims.dims] == [("x", 1, "seq", None)]


def test_mistakes_are_reported_at_the_class() -> None:
    with pytest.raises(ConfigError, match="did you mean 'max_plans'"):
        support_graph_compile(max_plan=3)
    with pytest.raises(DimError, match="expected an int"):
        support_graph_compile(dynamic_arg_dims={"x": "0"})
    with pytest.raises(DimError, match="did you mean 'x'"):
        support_graph_compile(dynamic_arg_dims={"X": 0})(Block)
    with pytest.raises(TypeError, match=r"nn\.Module classes"):
        support_graph_compile(dict)  # type: ignore[type-var]
    for wrong in ("x", lambda x: x):
        with pytest.raises(TypeError, match=r"nn\.Module classes.*for a function .* graphcap\.compile"):
            support_graph_compile(wrong)  # type: ignore[call-overload]
    with pytest.raises(ConfigError, match="enable_if: expected a function of the instance, got True"):
        support_graph_compile(enable_if=True)  # type: ignore[call-overload]
    with pytest.raises(DimError, match="no argument 'self'"):
        support_graph_compile(dynamic_arg_dims={"self": 0})(Block)


def test_decorating_twice_is_decorating_once(graphs: list[Any]) -> None:
    @support_graph_compile(max_plans=5)
    @support_graph_compile(max_plans=3)
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    model = Twice()
    assert_same_as_eager(model, rows(3))
    assert len(graphs) == 1
    assert record(model).config.max_plans == 5


def test_an_instance_may_be_compiled_differently(graphs: list[Any]) -> None:
    block = graphcap.compile(Block(), max_plans=7)
    block(rows(3))
    assert record(block).config.max_plans == 7
    assert len(graphs) == 1


# Subclasses.


def test_a_subclass_is_compiled_with_its_own_arguments(graphs: list[Any]) -> None:
    model = Shifted()
    for size in SIZES:
        assert_same_as_eager(model, rows(size), rows(size))
    assert len(graphs) == 1
    assert record(model).name == "Shifted.forward"
    assert [dim.path for dim in record(model).dims.dims] == ["x", "shift"]


def test_declared_dims_are_inherited_where_they_fit(graphs: list[Any]) -> None:
    @support_graph_compile(dynamic_arg_dims={"x": {0: "rows"}})
    class Base(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    class Same(Base):
        def forward(self, x):  # type: ignore[no-untyped-def]
            return x + 2

    class Other(Base):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden + 3

    dims = []
    for model in (Same(), Other()):
        model(rows(3))
        dims.append([tuple(dim) for dim in record(model).dims.dims])
    assert dims == [[("x", 0, "rows", None)], [("hidden", 0, "num_tokens", None)]]


def test_a_decorated_subclass_is_not_wrapped_twice(graphs: list[Any]) -> None:
    @support_graph_compile(max_plans=9)
    class Again(Block):
        pass

    model = Again()
    assert_same_as_eager(model, rows(3))
    assert len(graphs) == 1
    assert record(model).config.max_plans == 9
    base = Block()
    base(rows(3))
    assert record(base).config.max_plans == graphcap.Config().max_plans


def test_an_abstract_base_may_be_decorated(graphs: list[Any]) -> None:
    @support_graph_compile(dynamic_arg_dims={"hidden": 0})
    class Abstract(nn.Module): ...

    class Concrete(Abstract):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden * 2

    model = Concrete()
    for size in SIZES:
        assert_same_as_eager(model, rows(size))
    assert len(graphs) == 1
