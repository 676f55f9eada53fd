"""What may be padded, how a call is padded and cut back, and why a size stays exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphcap.config import Config
from graphcap.cudagraph import Capture, Constant, InputKind, InputSpec, Program, Size, Step
from graphcap.cudagraph.padded.corner import cut, fill_around
from graphcap.cudagraph.padded.padding import Padding
from graphcap.errors import ConfigError
from tests.cudagraph.padded_regions import N, PaddedRegion, padding_of, proof_of

STARTS = Size("n", 1, 1)


def identity_of(*shapes: Any, **specs: Any) -> Program:
    """Returns each of its inputs times one; each has one entry of ``shapes``."""
    region = PaddedRegion()
    inputs = [region.rows(f"x{i}", *rest, size=first, **specs) for i, (first, *rest) in enumerate(shapes)]
    outputs = [region.step(lambda x: x * 1, slot) for slot in inputs]
    return region.program(*outputs, sizes=shapes)


def test_a_declared_size_is_padded() -> None:
    padding = padding_of(identity_of((N, 3), (STARTS,)))
    assert (padding.names, padding.refused, padding.fixed) == ({"n": "n"}, {}, {})
    assert padding.inputs == {1, 2}
    assert padding.sizes([5]) == {"n": 5}


def test_constant_edge_and_function_fills() -> None:
    def count_up(tensor: torch.Tensor, size: torch.Size) -> None:
        tensor[size[0] :] = torch.arange(tensor.shape[0] - size[0])[:, None]

    program = identity_of((N, 2), (STARTS,), (N, 2), (N, 2))
    padding = padding_of(program, pad={"x0": -1, "x1": "edge", "x2": count_up})
    x, starts = torch.tensor([[1, 2]]), torch.tensor([0, 4])
    n, *padded = padding.pad([1, x, starts, x, x], {"n": 3})
    assert n == 3
    assert [each.tolist() for each in padded] == [
        [[1, 2], [-1, -1], [-1, -1]],
        [0, 4, 4, 4],
        [[1, 2], [0, 0], [1, 1]],
        [[1, 2], [0, 0], [0, 0]],
    ]


def test_the_callers_tensors_are_left_alone() -> None:
    x = torch.ones(2, 2)
    padding = padding_of(identity_of((N, 2)))
    padding.pad([2, x], {"n": 4})[1].zero_()
    assert torch.equal(x, torch.ones(2, 2))


@pytest.mark.parametrize("fill", ["Edge", None, [0], torch])
def test_a_fill_that_makes_no_sense(fill: Any) -> None:
    with pytest.raises(ConfigError, match="pad: expected a number, 'edge' or a function for 'x'"):
        Config(pad={"x": fill})


def test_the_fill_of_a_container_is_that_of_everything_in_it() -> None:
    region = PaddedRegion()
    ids, slots = region.rows("batch.ids"), region.rows("batch.slots", index=True)
    program = region.program(region.step(lambda ids, slots: ids + slots, ids, slots), sizes=[(N,)])
    padding = padding_of(program, pad={"batch": 3, "batch.slots": -1})
    assert (padding.fill(ids), padding.fill(slots)) == (3, -1)


# Refusals.


def refused(build: Callable[[PaddedRegion], int], *, sizes: Any = ((N,),), **given: Any) -> str:
    region = PaddedRegion()
    out = build(region)
    return padding_of(region.program(out, sizes=sizes), **given).refused["n"]


def plus_one(region: PaddedRegion, slot: int, *others: int) -> int:
    return region.step(lambda x, *others: x + 1, slot, *others)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda r: plus_one(r, r.rows("x"), r.rows("cache", declared=False)), "cache dim 0 .* not declared"),
        (lambda r: plus_one(r, r.rows("x"), r.rows("y", Size("n"), dim_names={0: "n"})), "y dim 1 .* not declared"),
        (lambda r: plus_one(r, r.rows("x"), r.rows("y", size=None)), "y dim 0 .* more than one symbol"),
        (lambda r: plus_one(r, r.rows("x"), r.state("y", 3)), ""),
        (lambda r: plus_one(r, r.rows("slots", index=True)), r"slots says where .* pad=\{'slots'"),
        (lambda r: plus_one(r, r.rows("x", 2, strides=(0, 1))), "x has strides"),
        (lambda r: plus_one(r, r.rows("x"), r.rows("y", size=4, strides=(N,))), "strides of y"),
        (lambda r: plus_one(r, r.rows("w", is_parameter=True)), "w is a parameter"),
    ],
)
def test_a_size_stays_exact_with_the_reason(build: Any, reason: str) -> None:
    region = PaddedRegion()
    out = build(region)
    padding = padding_of(region.program(out, sizes=[(N,)]))
    if not reason:
        assert padding.names
        return
    assert not padding
    assert not padding.inputs
    assert padding.refused.keys() == {"n"}
    assert torch.testing  # the reason reads as a sentence about an input
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(padding.refused["n"])
    assert any("is not padded" in note for note in padding.notes)


def test_a_write_index_with_a_fill_is_padded() -> None:
    region = PaddedRegion()
    program = region.program(plus_one(region, region.rows("slots", index=True)), sizes=[(N,)])
    assert padding_of(program, pad={"slots": -1}).names


def test_an_output_of_unknown_size_is_refused() -> None:
    x = InputSpec("x", InputKind.TENSOR, sizes=(N,), dim_names={0: "n"})
    n = InputSpec("n", InputKind.SCALAR, symbol="n", in_key=True)
    step = Step("piece_0", lambda x: (x[::2] * 1,), (1,), (2,), symbols=frozenset({"n"}))
    program = Program("region", (n, x), (step,), (2,), lambda n, x: (x[::2] * 1,), ((None,),))
    assert "output 0" in Padding(program, Config()).refused["n"]


def test_a_size_outside_of_the_key_is_refused() -> None:
    x = InputSpec("x", InputKind.TENSOR, sizes=(N,), dim_names={0: "n"})
    n = InputSpec("n", InputKind.SCALAR, symbol="n", in_key=False)
    step = Step("piece_0", lambda x: (x + 1,), (1,), (2,), capture=Capture.NEVER)
    program = Program("region", (n, x), (step,), (2,), lambda n, x: (x + 1,), ((N,),))
    assert "not part of the graph key" in Padding(program, Config()).refused["n"]


def test_without_declared_dims_the_ladder_is_exact_and_a_note_says_so() -> None:
    program = identity_of((N, 2), declared=False)
    assert padding_of(program).notes == ()
    (note,) = padding_of(program, capture_sizes=[4]).notes
    assert "capture_sizes lists exact sizes" in note


@pytest.mark.parametrize(
    ("args", "rung", "reason"),
    [
        ([5, torch.ones(5, 2), torch.ones(6)], 4, "n is 5, the plan is for up to 4"),
        ([0, torch.ones(0, 2), torch.ones(1)], 4, "n is 0"),
        ([3, torch.ones(4, 2), torch.ones(4)], 4, "x0 has the size"),
        ([3, torch.ones(3, 2).to_sparse(), torch.ones(4)], 4, "layout"),
        ([3, torch.ones(3, 2), torch.ones(4)], 2000, "max_copy_bytes"),
        ([3, torch.ones(3, 2), torch.ones(4)], 4, ""),
    ],
)
def test_a_call_that_cannot_be_padded(args: list[Any], rung: int, reason: str) -> None:
    padding = padding_of(identity_of((N, 2), (STARTS,)), max_copy_bytes=8000)
    found = padding.why_not_to({"n": rung}, args)
    assert (reason in found) if reason else not found


def test_sizes_that_contradict_each_other() -> None:
    region = PaddedRegion()
    region.specs.append(InputSpec("m", InputKind.SCALAR, symbol="n", in_key=True, sizes=(N,)))
    region._next += 1
    program = region.program(plus_one(region, region.rows("x")), sizes=[(N,)])
    padding = padding_of(program)
    assert padding.sizes([3, 3]) == {"n": 3}
    assert padding.sizes([3, 4]) is None
    assert "do not" in padding.why_not_to({"n": 4}, [3, 4, torch.ones(3)])


def test_a_number_that_follows_the_size_is_padded_with_it() -> None:
    region = PaddedRegion()
    region.specs.append(InputSpec("starts.size().0", InputKind.SCALAR, symbol="n + 1", in_key=True, sizes=(STARTS,)))
    region._next += 1
    program = region.program(plus_one(region, region.rows("x", size=STARTS)), sizes=[(STARTS,)])
    assert padding_of(program).pad([3, 4, torch.ones(4)], {"n": 8})[:2] == [8, 9]


def test_a_size_that_does_not_fit_its_formula_contradicts() -> None:
    region = PaddedRegion()
    region.specs[0] = InputSpec("m", InputKind.SCALAR, symbol="2*n", in_key=True, sizes=(Size("n", 2),))
    program = region.program(plus_one(region, region.rows("x", size=Size("n", 2))), sizes=[(Size("n", 2),)])
    padding = padding_of(program)
    assert (padding.sizes([6]), padding.sizes([5])) == ({"n": 3}, None)


def test_a_dim_with_a_max_is_always_that_large() -> None:
    region = PaddedRegion()
    region.size("blocks")
    table = region.rows("table", Size("blocks"), dim_names={0: "n", 1: "blocks"})
    program = region.program(region.step(lambda t: t[:, 0] * 1, table), sizes=[(N,)], largest={"blocks": 8})
    padding = padding_of(program)
    assert padding.fixed == {"blocks": 8}
    args = [2, 3, torch.ones(2, 3)]
    assert padding.pad(args, {"n": 4})[2].shape == (4, 8)
    assert padding.goal(args, {"n": 4}) == {"n": 4, "blocks": 8}
    assert "blocks is 9" in padding.why_not_to({"n": 4}, [2, 9, torch.ones(2, 9)])
    assert proof_of(program, args, {"n": 4}).reason == ""


def test_constants_and_returned_arguments() -> None:
    region = PaddedRegion()
    x = region.rows("x")
    program = region.program(x, Constant(7), 0, x, sizes=[(N,), (), (N,), (N,)])
    padding, mine = padding_of(program), torch.ones(3)
    padded = padding.pad([3, mine], {"n": 4})
    first, seven, n, again = padding.cut([3, mine], [padded[1], 7, 4, padded[1]])
    assert first is again is mine
    assert (seven, n) == (7, 3)


# Laws.


@st.composite
def layouts(draw: Any) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """Sizes of a tensor, some following n, and an order of its dims in memory."""
    follows = st.builds(Size, st.just("n"), st.integers(1, 2), st.integers(0, 2))
    sizes = draw(st.lists(st.one_of(st.integers(1, 3), follows), min_size=1, max_size=3).map(tuple))
    return sizes, tuple(draw(st.permutations(range(len(sizes)))))


DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.bool, torch.complex64]


@settings(max_examples=60, deadline=None)
@given(layouts(), st.integers(1, 5), st.integers(0, 5), st.sampled_from(DTYPES), st.sampled_from([0, 1, "edge"]))
def test_cutting_a_padded_tensor_gives_the_tensor(layout, n, more, dtype, fill):
    sizes, order = layout
    back = [order.index(dim) for dim in range(len(order))]
    real = [size.at(n) if isinstance(size, Size) else size for size in sizes]
    tensor = (torch.randn([real[dim] for dim in order]) * 9).to(dtype).permute(back)
    names = {dim: "n" for dim, size in enumerate(sizes) if isinstance(size, Size)}
    region = PaddedRegion()
    x = region.rows("x", *sizes[1:], size=sizes[0], dim_names=names)
    program = region.program(region.step(lambda x: x.clone(), x), sizes=[sizes])
    padding = padding_of(program, pad={"x": fill})
    assert bool(padding) is bool(names)
    _, padded = padding.pad([n, tensor], {"n": n + more})
    assert list(padded.shape) == [size.at(n + more) if isinstance(size, Size) else size for size in sizes]
    (result,) = padding.cut([n, tensor], program.run(n + more, padded))
    torch.testing.assert_close(result, tensor, rtol=0, atol=0, equal_nan=True)
    assert result.is_contiguous() or not names


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3)), min_size=1, max_size=3), st.sampled_from([7, "edge"]))
def test_a_fill_reaches_everything_but_the_corner(dims, fill):
    size = torch.Size(real for real, _ in dims)
    corner = torch.arange(size.numel()).view(size) + 100
    tensor = torch.full([real + more for real, more in dims], -5)
    tensor[tuple(slice(each) for each in size)] = corner
    fill_around(tensor, size, fill)
    assert torch.equal(cut(tensor, size), corner)
    if fill == 7:
        assert int((tensor == 7).sum()) == tensor.numel() - corner.numel()
    else:
        clamped = [torch.arange(length).clamp(max=real - 1) for length, real in zip(tensor.shape, size, strict=True)]
        assert torch.equal(tensor, corner[torch.meshgrid(*clamped, indexing="ij")])
