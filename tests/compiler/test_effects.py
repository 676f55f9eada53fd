"""Which inputs a piece writes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from graphcap.compiler.eager_functions import eager
from graphcap.compiler.effects import mutated_inputs, written_overlap
from tests.compiler.graphs import in_backend, pieces_of


@torch.library.custom_op("graphcap_test_effects::append", mutates_args=("cache",))
def append(cache: Tensor, new: Tensor) -> None:
    cache[: new.shape[0]] = new


@append.register_fake
def _(cache: Tensor, new: Tensor) -> None:
    return None


@torch.library.custom_op("graphcap_test_effects::broken", mutates_args=())
def broken(x: Tensor) -> Tensor:
    return x * 2


@broken.register_fake
def _(x: Tensor) -> Tensor:
    if broken_is_broken:
        raise RuntimeError("no fake today")
    return torch.empty_like(x)


broken_is_broken = False


@eager
def writes(x: Tensor) -> Tensor:
    x.add_(1)
    return x * 2


def written_by(fn: Any, *inputs: Tensor) -> list[str]:
    """The inputs of the function that its only piece writes."""

    def look(gm: torch.fx.GraphModule, _: Any) -> list[str]:
        (piece,) = pieces_of(gm)
        return [piece.inputs[i].name for i in mutated_inputs(piece.module)]

    (names,) = in_backend(look, fn, *inputs)
    assert isinstance(names, list)
    return names


X, Y = torch.randn(4, 4), torch.randn(4, 4)


def set_row(x: Tensor, y: Tensor) -> Tensor:
    x[0] = y[0]
    return x + y


def through_a_view(x: Tensor, y: Tensor) -> Tensor:
    x.t()[1:].mul_(2)
    return x + y


def out_argument(x: Tensor, y: Tensor) -> Tensor:
    torch.add(y, 1, out=x)
    return x + y


def custom(x: Tensor, y: Tensor) -> Tensor:
    append(x, y)
    return y + 1


def own_intermediate(x: Tensor, y: Tensor) -> Tensor:
    return (x + 1).add_(y)


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (lambda x, y: x + y, []),
        (own_intermediate, []),
        (lambda x, y: x.add_(y) * 2, ["x"]),
        (lambda x, y: F.relu(x, inplace=True) + y, ["x"]),
        (set_row, ["x"]),
        (through_a_view, ["x"]),
        (out_argument, ["x"]),
        (custom, ["x"]),
        (lambda x, y: writes(x) + y, ["x"]),
    ],
    ids=["none", "intermediate", "method", "flag", "setitem", "view", "out", "custom_op", "eager"],
)
def test_written_inputs(fn: Any, expected: list[str]) -> None:
    seen: list[str] = []

    def look(gm: torch.fx.GraphModule, _: Any) -> None:
        for piece in pieces_of(gm):
            seen.extend(piece.inputs[i].name for i in mutated_inputs(piece.module))

    in_backend(look, fn, X.clone(), Y.clone())
    assert [name.split("_")[1] for name in seen] == expected


def test_running_statistics_are_written() -> None:
    written = written_by(torch.nn.BatchNorm1d(4).train(), X)
    names = [name.partition("buffers_")[2].rstrip("_") for name in written]
    assert names == ["num_batches_tracked", "running_mean", "running_var"]


def test_running_statistics_are_only_read_in_eval() -> None:
    assert written_by(torch.nn.BatchNorm1d(4).eval(), X) == []


def test_an_input_that_aliases_a_written_one_counts_too() -> None:
    def look(gm: torch.fx.GraphModule, _: Any) -> list[int]:
        *_, last = pieces_of(gm)
        return list(mutated_inputs(last.module))

    def f(x: Tensor) -> Tensor:
        base = x + 1
        view = base[1:]
        broken(base)
        base.mul_(2)
        return view + 1

    (positions,) = in_backend(look, f, X)
    assert len(positions) == 2


def test_flex_attention_writes_nothing() -> None:
    def look(gm: torch.fx.GraphModule, _: Any) -> list[tuple[int, ...]]:
        return [mutated_inputs(piece.module) for piece in pieces_of(gm)]

    (written,) = in_backend(look, lambda q: flex_attention(q + 1, q, q) * 2, torch.randn(1, 2, 4, 8))
    assert set(written) == {()}


def test_a_piece_that_cannot_run_on_fakes_counts_as_writing_everything() -> None:
    def look(gm: torch.fx.GraphModule, _: Any) -> list[tuple[int, ...]]:
        global broken_is_broken
        broken_is_broken = True
        try:
            return [mutated_inputs(piece.module) for piece in pieces_of(gm)]
        finally:
            broken_is_broken = False

    (written,) = in_backend(look, lambda x: broken(x + 1) + 1, X)
    assert written == [(), (0,), ()]


def test_looking_adds_no_guard_and_changes_no_recorded_value() -> None:
    def look(gm: torch.fx.GraphModule, _: Any) -> tuple[Any, Any]:
        from graphcap.compiler import private

        mode = private.fake_mode_of([n.meta.get("example_value") for n in gm.graph.nodes])

        def state() -> Any:
            return len(private.shape_guards(mode)), [str(n.meta.get("example_value")) for n in gm.graph.nodes]

        pieces, before = pieces_of(gm), state()
        for piece in pieces:
            mutated_inputs(piece.module)
        return before, state()

    def f(x: Tensor) -> Tensor:
        y = x + 1
        y.unsqueeze_(0)
        return y.transpose_(1, 2) * 2

    x = torch.randn(4, 6)
    torch._dynamo.mark_dynamic(x, 0)
    ((before, after),) = in_backend(look, f, x)
    assert before == after


def overlaps(fn: Any, *inputs: Tensor) -> list[str]:
    """For each piece of the function why it must run as it is."""

    def look(gm: torch.fx.GraphModule, _: Any) -> list[str]:
        return [written_overlap(piece.module, mutated_inputs(piece.module)) for piece in pieces_of(gm)]

    (reasons,) = in_backend(look, fn, *inputs)
    assert isinstance(reasons, list)
    return reasons


def test_a_view_and_its_base_must_not_be_written_in_one_piece() -> None:
    def f(x: Tensor) -> Tensor:
        base = x + 1
        view = base[1:]
        broken(base)
        base.mul_(2)
        return view + base[1:]

    *before, last = overlaps(f, X)
    assert "share memory that it writes" in last
    assert not any(before)


def test_keys_and_values_in_one_buffer_lie_apart() -> None:
    def f(kv: Tensor, new: Tensor) -> Tensor:
        keys, values = kv[0], kv[1]
        broken(new)
        keys[0] = new[0]
        values[0] = new[1]
        return keys + values

    assert not any(overlaps(f, torch.zeros(2, 4, 4), X))


def test_a_view_that_is_only_read_is_no_obstacle() -> None:
    def f(x: Tensor) -> Tensor:
        base = x + 1
        view = base[1:]
        broken(base)
        return view + base[1:]

    assert not any(overlaps(f, X))
