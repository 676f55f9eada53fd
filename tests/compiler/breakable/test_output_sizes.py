"""What the sizes of results follow, from calls of several sizes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from graphcap.compiler.breakable.output_sizes import Sample, contradicts, solve, tell_apart
from graphcap.cudagraph import DimSize, Size

SIZES = st.one_of(
    st.integers(0, 9),
    st.builds(Size, st.sampled_from(["n", "m"]), st.integers(1, 4), st.integers(-1, 3)),
)


def at(size: DimSize, values: dict[str, int]) -> int:
    return size.at(values[size.symbol]) if isinstance(size, Size) else int(size or 0)


@given(st.lists(st.lists(SIZES, max_size=3), max_size=3), st.lists(st.integers(1, 50), min_size=4, max_size=4))
def test_sizes_that_follow_one_symbol_are_found(outputs: list[list[DimSize]], numbers: list[int]) -> None:
    """Each symbol changes alone, so that it is clear which one a size follows."""
    n, m, step_n, step_m = numbers
    calls = [{"n": n, "m": m}, {"n": n + step_n, "m": m}, {"n": n + step_n, "m": m + step_m}]
    samples = [Sample(each, tuple(tuple(at(size, each) for size in out) for out in outputs)) for each in calls]
    assert solve(samples) == tuple(map(tuple, outputs))
    assert not any(contradicts(solve(samples), each) for each in samples)


def test_a_product_of_two_symbols_follows_none() -> None:
    calls = [(2, 3), (4, 3), (4, 5), (6, 7)]
    samples = [Sample({"n": n, "m": m}, ((n * m,),)) for n, m in calls]
    assert solve(samples) == ((None,),)


def test_where_several_symbols_fit_the_first_one_is_taken_and_can_be_contradicted() -> None:
    samples = [Sample({"tokens": n, "reqs": n}, ((n, 4),)) for n in (8, 5)]
    sizes = solve(samples)
    assert sizes == ((Size("tokens"), 4),)
    contradicting = Sample({"tokens": 9, "reqs": 3}, ((3, 4),))
    assert contradicts(sizes, contradicting)
    assert solve([*samples, contradicting]) == ((Size("reqs"), 4),)


def test_one_size_tells_nothing() -> None:
    samples = [Sample({"n": 8}, ((8,),))]
    assert solve(samples) == ((8,),)
    assert not tell_apart(samples, {"n": 5}, {"n": 8})
    assert tell_apart(samples, {"n": 8}, {"n": 8})
    assert tell_apart([*samples, Sample({"n": 5}, ((5,),))], {"n": 5}, {"n": 8})
