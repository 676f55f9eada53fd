"""The program of a region and its generated function."""

from __future__ import annotations

import traceback
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import mark_dynamic

from graphcap.compiler.eager_functions import eager
from graphcap.compiler.stitch import identifier, live_source
from graphcap.cudagraph import Constant, InputKind, InputSpec, Program, Step
from tests.compiler.graphs import in_backend, stitched


@eager
def live(x: Tensor) -> Tensor:
    return x * 3


def program_of(fn: Any, *inputs: Any, **options: Any) -> tuple[Program, str]:
    (found,) = in_backend(stitched, fn, *inputs, **options)
    assert isinstance(found, tuple)
    return found


def chain(x: Tensor) -> Tensor:
    return live(live(x + 1) * 2) - 1


X = torch.arange(6.0)


def test_the_program_returns_what_the_function_returns() -> None:
    program, _ = program_of(chain, X)
    (result,) = program.run(X)
    assert torch.equal(result, chain(X))


def test_every_slot_is_written_once_and_before_it_is_read() -> None:
    program, _ = program_of(chain, X)
    known = set(range(len(program.inputs)))
    for step in program.steps:
        assert set(step.reads) <= known
        assert known.isdisjoint(step.writes)
        known |= set(step.writes)
    assert {o for o in program.outputs if isinstance(o, int)} <= known


def test_inputs_are_named_as_the_user_names_them() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 6))
    program, _ = program_of(model, X)
    kinds = {spec.name.removeprefix("fn."): spec.kind for spec in program.inputs}
    assert kinds["0.weight"] is InputKind.STATIC
    assert kinds["0.bias"] is InputKind.STATIC
    assert sorted(kind.value for kind in kinds.values()) == ["static", "static", "tensor"]


def test_a_size_of_the_key_is_a_scalar_input() -> None:
    x = torch.randn(4, 6)
    mark_dynamic(x, 0)
    program, _ = program_of(chain, x)
    (scalar,) = [spec for spec in program.inputs if spec.kind is InputKind.SCALAR]
    assert scalar.in_key
    assert scalar.symbol


def test_a_growing_size_is_not_in_the_key() -> None:
    cache = torch.randn(4, 6)
    mark_dynamic(cache, 0)
    program, _ = program_of(lambda x, cache: (x + 1, torch.cat([cache, x])), torch.randn(1, 6), cache)
    (scalar,) = [spec for spec in program.inputs if spec.kind is InputKind.SCALAR]
    assert not scalar.in_key


def test_constants_among_the_outputs() -> None:
    """Dynamo keeps them in its bytecode; a graph that has them is a graph that somebody rewrote."""

    def look(gm: torch.fx.GraphModule, example_inputs: Any) -> Program:
        output = next(n for n in gm.graph.nodes if n.op == "output")
        output.args = ((*output.args[0], None, 7),)
        return stitched(gm, example_inputs)[0]

    (program,) = in_backend(look, chain, X)
    result, nothing, seven = program.run(X)
    assert torch.equal(result, chain(X))
    assert (nothing, seven) == (None, 7)


def test_mutated_inputs_are_declared_by_slot() -> None:
    program, _ = program_of(lambda x, y: live(x.add_(y)), X.clone(), X)
    (mutates,) = {step.mutates for step in program.steps if step.mutates}
    assert [program.inputs[slot].name for slot in mutates] == ["x"]


def test_values_are_dropped_after_their_last_use() -> None:
    alive: list[weakref.ref[Tensor]] = []

    @eager
    def first(x: Tensor) -> Tensor:
        y = x * 2
        alive.append(weakref.ref(y))
        return y

    @eager
    def last(x: Tensor) -> Tensor:
        if len(alive) == 2:  # on the real call: the fake one made the first entry
            assert alive[-1]() is None, "the first value is still held"
        return x + 1

    program, source = program_of(lambda x: last(first(x).sin().cos()), X)
    del alive[1:]
    program.run(X)
    assert "del " in source


def test_nothing_is_dropped_that_is_returned_or_a_parameter() -> None:
    _, source = program_of(lambda x: (live(x) + 1, x * 2), X)
    returned = source.rpartition("return")[2]
    dropped = [name for line in source.splitlines() if "del " in line for name in line.split("del ")[1].split(", ")]
    assert not any(name in returned for name in dropped)


def test_a_traceback_shows_the_generated_line() -> None:
    armed = False

    @eager
    def fails(x: Tensor) -> Tensor:
        if armed:
            raise KeyError("here")
        return x * 1

    program, source = program_of(lambda x: fails(x + 1) + 1, X)
    armed = True
    with pytest.raises(KeyError) as caught:
        program.run(X)
    shown = "".join(traceback.format_exception(caught.value))
    assert next(line.strip() for line in source.splitlines() if "piece_1" in line) in shown


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("layers.0.weight", "layers_0_weight"),
        ("0.weight", "_0_weight"),
        ("class", "_class"),
        ("", "arg"),
        ("é€", "é"),
        ("a b", "a_b"),
    ],
)
def test_identifier(name: str, expected: str) -> None:
    assert identifier(name) == expected
    assert identifier(name).isidentifier()


def test_source_of_a_program_without_steps_and_outputs() -> None:
    assert live_source("f", [], [], [], []) == "def f():\n    return ()\n"


def test_source_reads_like_a_script() -> None:
    inputs = [InputSpec("x", InputKind.TENSOR), InputSpec("fc.weight", InputKind.STATIC)]
    steps = [
        Step("piece_0", lambda x, w: (x,), (0, 1), (2,)),
        Step("piece_1", lambda v: (v,), (2,), (3,)),
        Step("piece_2", lambda v: (), (3,), ()),
    ]
    text = live_source("forward_0", inputs, steps, [3, Constant(None)], ["captured, fc", "eager, attn", "captured"])
    assert text == (
        "def forward_0(x_0, fc_weight_1):\n"
        "    v2, = piece_0(x_0, fc_weight_1)  # captured, fc\n"
        "    del x_0\n"
        "    v3, = piece_1(v2)  # eager, attn\n"
        "    del v2\n"
        "    piece_2(v3)  # captured\n"
        "    return (v3, constant_1, )\n"
    )
