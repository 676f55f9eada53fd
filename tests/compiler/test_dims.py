"""What the graph runtime is told about sizes: symbols, declared names, and which inputs are write indices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import mark_dynamic

import graphcap
import graphcap.compiler.backend as backend
from graphcap.compiler.eager_functions import eager
from graphcap.cudagraph import InputSpec, Program, Size


@pytest.fixture
def program_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Program]:
    """The program of a function that is called once with declared dims; ``None`` goes through ``torch.compile``."""
    seen: list[Program] = []
    original = backend.capturing

    def look(program: Program, *rest: Any) -> Any:
        seen.append(program)
        return original(program, *rest)

    monkeypatch.setattr(backend, "capturing", look)

    def build(fn: Callable[..., Any], declared: Mapping[str, Any] | None, *args: Any) -> Program:
        seen.clear()
        with torch.no_grad():
            if declared is None:
                torch.compile(fn, backend="graphcap", options={"compiler": "eager", "cache": False})(*args)
            else:
                graphcap.compile(fn, dynamic_arg_dims=declared, compiler="eager", cache=False)(*args)
        (program,) = seen
        return program

    return build


def spec(program: Program, name: str) -> InputSpec:
    return next(each for each in program.inputs if each.name == name)


def rows(num_rows: int, *rest: int) -> Tensor:
    return torch.randn(num_rows, *rest)


def test_sizes_strides_and_names_of_declared_dims(program_of):
    def fn(x, y):
        return x * 2 + y, x.t()[:, 1:]

    program = program_of(fn, {"x": {0: "n"}, "y": {-2: "n"}}, rows(5, 3), rows(5, 3))
    (symbol,) = program.steps[0].symbols
    for name in ("x", "y"):
        assert spec(program, name).sizes == (Size(symbol), 3)
        assert spec(program, name).strides == (3, 1)
        assert spec(program, name).dim_names == {0: "n"}
    assert program.output_sizes == ((Size(symbol), 3), (3, Size(symbol, 1, -1)))
    (scalar,) = [each for each in program.inputs if each.symbol is not None]
    assert (scalar.symbol, scalar.sizes) == (symbol, (Size(symbol),))


def test_dims_of_one_name_follow_one_symbol(program_of):
    """Nothing in this graph relates the two sizes."""
    program = program_of(lambda x, y: (x + 1, y + 1), {"x": {0: "n"}, "y": {0: "n"}}, rows(5), rows(5))
    assert spec(program, "x").sizes == spec(program, "y").sizes


def test_a_name_may_follow_another(program_of):
    def fn(ids, starts, lens):
        return ids * 2, starts[1:] - starts[:-1], lens + 1

    declared = {"ids": 0, "starts": {0: "num_reqs+1"}, "lens": {0: "num_reqs"}}
    program = program_of(fn, declared, rows(5), rows(4), rows(3))
    (size,) = spec(program, "lens").sizes
    assert isinstance(size, Size)
    assert spec(program, "starts").sizes == (Size(size.symbol, 1, 1),)
    assert program.output_sizes[1] == (size,)


def test_a_name_may_follow_one_that_no_dim_has(program_of):
    program = program_of(lambda starts: starts[1:] - starts[:-1], {"starts": {0: "num_reqs + 1"}}, rows(4))
    starts = spec(program, "starts")
    assert starts.sizes == (Size("_num_reqs_", 1, 1),)
    assert starts.dim_names == {0: "num_reqs"}
    assert program.output_sizes == ((Size("_num_reqs_"),),)
    assert program.steps[0].symbols == {"_num_reqs_"}


def test_a_dim_with_a_max(program_of):
    declared = {"table": {0: "num_reqs", 1: graphcap.Dim("blocks", max=16)}}
    program = program_of(lambda table: table + 1, declared, rows(3, 5))
    _, blocks = spec(program, "table").sizes
    assert isinstance(blocks, Size)
    assert program.largest == {blocks.symbol: 16}


@pytest.mark.parametrize("declared", [{"batch.ids": 0}, {"batch": {"ids": 0}}, {"batch": 0}])
def test_nested_inputs(program_of, declared):
    program = program_of(lambda batch: batch["ids"] * 2, declared, {"ids": rows(5)})
    assert spec(program, "batch.ids").dim_names == {0: "num_tokens"}


def test_a_parameter_that_is_called_as_an_argument_is_not_declared(program_of):
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = torch.nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.x(x)

    program = program_of(Model(), {"x": 0}, rows(5, 3))
    assert {each.name: dict(each.dim_names) for each in program.inputs if each.dim_names} == {"x": {0: "num_tokens"}}


def test_marked_dims_count_as_declared_and_inferred_ones_do_not(program_of):
    x, y = rows(5), rows(5)
    mark_dynamic(x, 0)
    program = program_of(lambda x: x + 1, None, x)
    assert spec(program, "x").dim_names == {0: "num_tokens"}

    def annotated(y: Tensor) -> Tensor:
        return y + 1

    with_inferred = graphcap.compile(annotated, compiler="eager", cache=False)
    assert with_inferred(y).shape == (5,)
    assert record_dims(with_inferred) == {}


def record_dims(fn: Any) -> Any:
    found = graphcap.compiler.frontend.api.record_of(fn)
    assert found is not None
    return found.config.dynamic_arg_dims


def test_marked_dims_that_differ_have_names_of_their_own(program_of):
    x, y = rows(5), rows(6)
    mark_dynamic(x, 0)
    mark_dynamic(y, 0)
    program = program_of(lambda x, y: (x + 1, y + 1), None, x, y)
    assert [spec(program, name).dim_names for name in "xy"] == [{0: "x.0"}, {0: "y.0"}]


def test_a_size_that_is_not_affine_is_unknown(program_of):
    program = program_of(lambda x: x[::2] * 1, {"x": 0}, rows(6))
    assert program.output_sizes == ((None,),)


@eager
def store(cache: Tensor, slots: Tensor, x: Tensor) -> Tensor:
    cache[slots] = x
    return x * 1


@eager
def look_up(cache: Tensor, slots: Tensor) -> Tensor:
    return cache[slots]


@pytest.mark.parametrize(
    ("fn", "is_index"),
    [
        (lambda cache, slots, x: (cache.index_copy_(0, slots, x), x + 1)[1], True),
        (lambda cache, slots, x: (cache.index_put_((slots.view(-1).long(),), x), x + 1)[1], True),
        (lambda cache, slots, x: (cache.scatter_(0, slots[:, None].expand(-1, 2) + 0, x), x + 1)[1], True),
        (lambda cache, slots, x: store(cache, slots + 1, x), True),
        (lambda cache, slots, x: look_up(cache, slots) + x, False),
        (lambda cache, slots, x: (cache.index_copy_(0, (slots * 1.0).long(), x), x + 1)[1], False),
        (lambda cache, slots, x: cache[slots] + x, False),
    ],
    ids=["index_copy_", "index_put_", "scatter_", "live write", "live read", "through floats", "read"],
)
def test_write_indices(program_of, fn, is_index):
    slots, x = torch.arange(3), rows(3, 2)
    program = program_of(fn, {"slots": 0, "x": 0}, rows(9, 2), slots, x)
    assert [each.name for each in program.inputs if each.is_write_index] == (["slots"] if is_index else [])


def test_a_slot_written_by_assignment_is_a_write_index(program_of):
    def fn(cache, slots, x):
        cache[slots] = x
        return x + 1

    program = program_of(fn, {"slots": 0, "x": 0}, rows(9, 2), torch.arange(3), rows(3, 2))
    assert spec(program, "slots").is_write_index
