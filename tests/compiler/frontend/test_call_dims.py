"""Dynamic dims of a call: which tensors they are, and what a call must look like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from graphcap.compiler.frontend.call_dims import CallDims
from graphcap.errors import DimError


@dataclass
class Batch:
    ids: Tensor
    mask: Tensor | None = None
    step: int = 0


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


def rows(num_rows: int, *more: int) -> Tensor:
    return torch.zeros(num_rows, *more)


def marked(dims: CallDims, *args: Any, **kwargs: Any) -> list[tuple[tuple[int, ...], dict[int, str]]]:
    return [(tuple(tensor.shape), names) for tensor, names in dims.tensors(args, kwargs)]


def two(x: Tensor, y: Tensor | None = None) -> None: ...


def one(batch: Any) -> None: ...


def test_an_unknown_argument_is_refused_with_the_nearest() -> None:
    def forward(input_ids: Tensor, positions: Tensor) -> None: ...

    with pytest.raises(DimError, match="no argument 'input_id'; did you mean 'input_ids'"):
        CallDims.of(forward, {"input_id": 0})


def test_arguments_are_found_however_they_are_passed() -> None:
    def forward(x: Tensor, *rest: Tensor, y: Tensor, **more: Tensor) -> None: ...

    dims = CallDims.of(forward, {"x": 0, "rest.1": {0: "r"}, "y": 0, "z": {0: "z"}, "more.w": {0: "w"}})
    assert marked(dims, rows(3), rows(4), rows(5), y=rows(3), z=rows(6), w=rows(7)) == [
        ((3,), {0: "num_tokens"}),
        ((5,), {0: "r"}),
        ((3,), {0: "num_tokens"}),
        ((6,), {0: "z"}),
        ((7,), {0: "w"}),
    ]
    assert marked(CallDims.of(two, {"x": 0, "y": 0}), y=rows(2), x=rows(2, 1)) == [
        ((2, 1), {0: "num_tokens"}),
        ((2,), {0: "num_tokens"}),
    ]


def test_a_missing_or_none_argument_is_skipped() -> None:
    dims = CallDims.of(two, {"x": 0, "y": 0})
    dims.check((rows(3),), {})
    dims.check((rows(3), None), {})
    assert marked(dims, rows(3), None) == [((3,), {0: "num_tokens"})]


@given(rank=st.integers(1, 4), dim=st.integers(-4, 3))
def test_a_dim_is_counted_from_either_end_or_refused(rank: int, dim: int) -> None:
    dims, tensor = CallDims.of(two, {"x": dim}), rows(*range(2, 2 + rank))
    if -rank <= dim < rank:
        dims.check((tensor,), {})
        assert marked(dims, tensor) == [(tuple(tensor.shape), {range(rank)[dim]: "num_tokens"})]
    else:
        with pytest.raises(DimError, match=f"x: dim {dim} is declared dynamic, but the tensor has {rank} dims"):
            dims.check((tensor,), {})


def test_a_tensor_without_dims_is_refused() -> None:
    with pytest.raises(DimError, match="has 0 dims"):
        CallDims.of(two, {"x": 0}).check((torch.tensor(1.0),), {})


def test_something_else_than_a_tensor_is_refused() -> None:
    with pytest.raises(DimError, match=r"x: expected a tensor, got int \(7\)"):
        CallDims.of(two, {"x": 0}).check((7,), {})


@given(sizes=st.lists(st.integers(0, 3), min_size=3, max_size=3), names=st.lists(st.sampled_from("mn"), min_size=3))
def test_dims_of_one_name_have_one_size(sizes: list[int], names: list[str]) -> None:
    def forward(a: Tensor, b: Tensor, c: Tensor) -> None: ...

    dims = CallDims.of(forward, {arg: {0: name} for arg, name in zip("abc", names, strict=False)})
    call = tuple(rows(size) for size in sizes)
    agree = all(len({s for s, n in zip(sizes, names, strict=False) if n == name}) <= 1 for name in "mn")
    if agree:
        dims.check(call, {})
    else:
        with pytest.raises(DimError, match="different sizes in one call"):
            dims.check(call, {})


def test_a_disagreement_names_the_arguments_and_sizes() -> None:
    with pytest.raises(DimError, match=r"x\.shape\[0\] = 3, y\.shape\[1\] = 4"):
        CallDims.of(two, {"x": 0, "y": 1}).check((rows(3), rows(2, 4)), {})


def test_independent_dims_may_differ() -> None:
    CallDims.of(two, {"x": 0, "y": 0}).independent().check((rows(3), rows(4)), {})


def test_what_was_inferred_and_does_not_fit_is_left_alone() -> None:
    dims = CallDims.of(two, None)
    dims.check((rows(3), torch.tensor(1.0)), {})
    dims.check((rows(3), 7), {})
    assert marked(dims, rows(3), torch.tensor(1.0)) == [((3,), {0: "num_tokens"})]


@pytest.mark.parametrize(
    ("path", "batch"),
    [
        ("batch.ids", Batch(rows(3))),
        ("batch.ids", {"ids": rows(3), "mask": rows(9)}),
        ("batch.first", Pair(rows(3), rows(9))),
        ("batch.1", [rows(9), rows(3)]),
        ("batch.1", {0: rows(9), 1: rows(3)}),
        ("batch.layers.0.ids", {"layers": (Batch(rows(3)),)}),
    ],
)
def test_a_dotted_path_leads_into_a_nested_input(path: str, batch: Any) -> None:
    dims = CallDims.of(one, {path: 0})
    dims.check((batch,), {})
    assert marked(dims, batch) == [((3,), {0: "num_tokens"})]


@pytest.mark.parametrize("batch", [Batch(rows(3), rows(3, 2)), {"a": [rows(3)], "b": (rows(3, 2), None, 5)}])
def test_a_container_stands_for_its_tensors(batch: Any) -> None:
    dims = CallDims.of(one, {"batch": 0})
    dims.check((batch,), {})
    assert marked(dims, batch) == [((3,), {0: "num_tokens"}), ((3, 2), {0: "num_tokens"})]


def test_tensors_in_a_container_must_agree_too() -> None:
    with pytest.raises(DimError, match=r"batch\.ids\.shape\[0\] = 3, batch\.mask\.shape\[0\] = 4"):
        CallDims.of(one, {"batch": 0}).check((Batch(rows(3), rows(4)),), {})


def test_an_absent_part_of_a_nested_input_is_skipped() -> None:
    assert marked(CallDims.of(one, {"batch.mask": 0}), {"ids": rows(3)}) == []
    assert marked(CallDims.of(one, {"batch.mask": 0}), Batch(rows(3))) == []
    assert marked(CallDims.of(one, {"batch.1": 0}), [rows(3)]) == []
    assert marked(CallDims.of(one, {"batch.ids": 0}), None) == []


def test_an_unknown_field_is_refused_with_the_nearest() -> None:
    with pytest.raises(DimError, match="Batch has no field 'masks'; did you mean 'mask'"):
        CallDims.of(one, {"batch.masks": 0}).check((Batch(rows(3)),), {})


def test_one_tensor_in_two_places_is_marked_once() -> None:
    x = rows(3, 4)
    assert marked(CallDims.of(two, {"x": 0, "y": {1: "m"}}), x, x) == [((3, 4), {0: "num_tokens", 1: "m"})]


def test_inputs_of_a_step_are_declared_and_are_no_arguments() -> None:
    declared = {"batch": 0, "step.seq_lens": {0: "num_reqs"}}
    dims = CallDims.of(one, declared)
    dims.check((rows(3),), {})
    dims.require(["step.seq_lens"], "pad")
    assert marked(dims, rows(3)) == [((3,), {0: "num_tokens"})]
    assert dims.declared() == dims.independent().declared() | {"batch": {0: "num_tokens"}}
    assert dims.declared()["step.seq_lens"] == {0: "num_reqs"}


def test_an_argument_called_step_is_an_argument() -> None:
    def stepwise(step: Batch) -> None: ...

    dims = CallDims.of(stepwise, {"step.ids": 0})
    assert marked(dims, Batch(rows(3))) == [((3,), {0: "num_tokens"})]
    assert dims.step_dims == ()
