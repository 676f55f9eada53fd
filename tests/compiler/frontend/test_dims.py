"""Dynamic dims: what may be declared and what is inferred."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Optional

import pytest
import torch
from torch import Tensor

from graphcap.compiler.frontend.dims import Dim, DynamicDim, infer, parse, unparse
from graphcap.errors import DimError

if TYPE_CHECKING:
    from elsewhere import Unknown


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        ({"x": 0}, [("x", 0, "num_tokens")]),
        ({"x": -1}, [("x", -1, "num_tokens")]),
        ({"x": [1]}, [("x", 1, "num_tokens")]),
        ({"x": [0, 1]}, [("x", 0, "x.0"), ("x", 1, "x.1")]),
        ({"x": {0: "batch", 1: "seq"}}, [("x", 0, "batch"), ("x", 1, "seq")]),
        ({"x": {1: Dim("blocks", max=512)}}, [("x", 1, "blocks", 512)]),
        ({"batch.ids": 0}, [("batch.ids", 0, "num_tokens")]),
        ({"batch": {"ids": 0, "mask": {1: "seq"}}}, [("batch.ids", 0, "num_tokens"), ("batch.mask", 1, "seq")]),
    ],
)
def test_declarations(declared: dict[str, Any], expected: list[tuple[str, int, str]]) -> None:
    assert parse(declared) == tuple(DynamicDim(*each) for each in expected)
    assert parse(unparse(parse(declared))) == parse(declared)


@pytest.mark.parametrize(
    ("name", "follows"),
    [
        ("num_reqs+1", ("num_reqs", 1, 1)),
        ("2*num_reqs", ("num_reqs", 2, 0)),
        ("2 * num_reqs - 1", ("num_reqs", 2, -1)),
        ("num_reqs", None),
        ("batch.ids.0", None),
    ],
)
def test_a_name_may_follow_another(name: str, follows: tuple[str, int, int] | None) -> None:
    (dim,) = parse({"x": {0: name}})
    assert dim.follows == follows


@pytest.mark.parametrize("arguments", [("",), (None,), ("n", 0), ("n", True), ("n", "8")])
def test_a_dim_that_makes_no_sense_is_refused(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(DimError, match="Dim"):
        Dim(*arguments)


@pytest.mark.parametrize("value", [True, "0", 1.0, None, [], {}, [0, "1"], {0: 1}, {0: ""}, {0: "n", "ids": 0}])
def test_a_declaration_that_makes_no_sense_is_refused(value: Any) -> None:
    with pytest.raises(DimError, match=r"dynamic_arg_dims\['x'\]"):
        parse({"x": value})


@pytest.mark.parametrize("declared", [["x"], {0: 0}, {"": 0}])
def test_arguments_are_named_by_strings(declared: Any) -> None:
    with pytest.raises(DimError, match="dynamic_arg_dims"):
        parse(declared)


def test_tensor_annotations_are_inferred() -> None:
    def forward(
        a: Tensor,
        b: torch.Tensor | None,
        c: Optional[Tensor] = None,  # noqa: UP045
        d: torch.LongTensor | None = None,
        e: Annotated[Tensor, "rows"] = None,  # type: ignore[assignment]
        f: int = 0,
        g: list[Tensor] | None = None,
        h: Tensor | float = 0.0,
        i=None,  # type: ignore[no-untyped-def]
        *,
        j: Tensor | None = None,
        **k: Tensor,
    ) -> None: ...

    assert [dim.path for dim in infer(forward)] == ["a", "b", "c", "d", "e", "j"]
    assert {(dim.dim, dim.name) for dim in infer(forward)} == {(0, "num_tokens")}


def test_an_annotation_that_cannot_be_resolved_costs_only_itself() -> None:
    def forward(x: Tensor, y: Unknown, z: Tensor | None = None) -> Unknown: ...

    assert [dim.path for dim in infer(forward)] == ["x", "z"]
