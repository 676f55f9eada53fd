"""Slices of sizes without an example have the size that they have, as traced and as compiled."""

from __future__ import annotations

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import graphcap
from graphcap.compiler import private
from graphcap.compiler.private.slices import bounds
from tests.compiler.frontend.calls import rows

_SIZE = sympy.Symbol("u0", integer=True, nonnegative=True)
_index = st.one_of(st.none(), st.integers(-6, 6))


@given(size=st.integers(0, 8), start=_index, end=_index)
def test_bounds_are_those_of_python(size: int, start: int | None, end: int | None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.fx.experimental.symbolic_shapes.free_unbacked_symbols", lambda size: {size})
        found = bounds(_SIZE, start, end)
    assert found is not None
    begin, length = (int(each.subs(_SIZE, size)) for each in found)
    expected = list(range(size))[start:end]
    assert length == len(expected)
    assert list(range(size))[begin : begin + length] == expected


def test_numbers_and_sizes_with_an_example_are_left_to_torch() -> None:
    assert bounds(sympy.Integer(5), 1, None) is None
    assert bounds(sympy.Symbol("s0"), 1, None) is None


def slices(x: Tensor) -> tuple[Tensor, ...]:
    neighbours = x[1:] - x[:-1]
    return neighbours, neighbours.sum(0), x[2:] * 2, x[-2:] + 1, x[:3].sin(), x[1:-1] * x[2:], x[::2] + 0


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_one_graph_serves_every_size(compiler: str) -> None:
    fast = graphcap.compile(slices, dynamic_arg_dims={"x": 0}, compiler=compiler, cudagraph_mode="NONE")
    with torch.no_grad():
        for num_rows in (6, 9, 4, 3, 2, 1):
            x = rows(num_rows)
            for mine, right in zip(fast(x), slices(x), strict=True):
                torch.testing.assert_close(mine, right)
    (region,) = graphcap.explain(fast).regions
    assert not region.bypass


def test_what_reads_a_slice_is_captured_and_padded() -> None:
    fast = graphcap.compile(
        lambda x, starts: (x * 2, starts[1:] - starts[:-1]),
        dynamic_arg_dims={"x": 0, "starts": {0: "num_tokens+1"}}, capture_sizes=[8], simulate=True,
    )  # fmt: skip
    with torch.no_grad():
        for num_rows in (7, 7, 5, 6, 8, 3):
            x, starts = rows(num_rows), torch.arange(num_rows + 1).cumsum(0)
            doubled, lengths = fast(x, starts)
            assert torch.equal(doubled, x * 2)
            assert torch.equal(lengths, torch.arange(1, num_rows + 1))
    report = graphcap.explain(fast)
    (region,) = report.regions
    assert sum(plan.replays for plan in region.plans) >= 2, report
    assert not any(plan.live for plan in region.plans)


def test_nobody_else_meets_it() -> None:
    from torch._inductor.lowering import lowerings
    from torch._subclasses.fake_impls import op_implementations_dict

    op = torch.ops.aten.slice.Tensor
    before = op_implementations_dict[op], lowerings[op]
    with private.exact_slices():
        pass
    assert (op_implementations_dict[op], lowerings[op]) == before
