"""Whether two tensors agree, and where they do not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphcap.cudagraph.checks.differences import difference, same_bits

DTYPES = [
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn),
    *(torch.complex64, torch.complex128, torch.int8, torch.int64, torch.bool),
]


def values(dtype: torch.dtype, *size: int) -> torch.Tensor:
    return (torch.randn(*size) * 8).to(dtype)


@settings(max_examples=40)
@given(dtype=st.sampled_from(DTYPES), num_rows=st.integers(1, 5), data=st.data())
def test_the_rows_that_were_changed_are_found(dtype, num_rows, data):
    changed = data.draw(st.sets(st.integers(0, num_rows - 1)))
    expected = values(dtype, num_rows, 3)
    actual = expected.clone()
    for row in changed:
        actual[row, 1] = ~actual[row, 1] if dtype is torch.bool else torch.tensor(100).to(dtype)
    found = difference(expected, actual)
    assert (found is None) == (not changed) == same_bits(expected, actual)
    if found is not None:
        assert list(found.rows) == sorted(changed)[:4]
        assert (found.num_rows, found.of) == (len(changed), num_rows)


def test_rounding_passes_for_floats_and_not_for_integers():
    x = torch.randn(4, 8)
    assert difference(x, x * (1 + 1e-6)) is None
    assert difference(x.bfloat16(), (x * 1.01).bfloat16()) is None
    large = torch.tensor([2**62, 5])
    found = difference(large, large + torch.tensor([1, 0]))
    assert found is not None
    assert (found.rows, found.max_abs) == ((0,), 1.0)


def test_a_small_row_is_measured_by_its_own_values():
    expected = torch.tensor([[1e6, 1e6], [1e-3, 1e-3]])
    actual = torch.tensor([[1e6, 1e6], [2e-3, 1e-3]])
    found = difference(expected, actual)
    assert found is not None
    assert found.rows == (1,)


def test_nan_equals_nan_and_nothing_else():
    nan = torch.tensor([float("nan"), 1.0])
    assert difference(nan, nan.clone()) is None
    found = difference(nan, torch.tensor([0.0, 1.0]))
    assert found is not None
    assert (found.rows, found.max_abs) == ((0,), float("inf"))


@pytest.mark.parametrize("actual", [torch.zeros(2, 3), torch.zeros(3, 2, dtype=torch.float64)], ids=["shape", "dtype"])
def test_another_shape_or_dtype_differs(actual):
    found = difference(torch.zeros(3, 2), actual)
    assert found is not None
    assert found.max_abs == float("inf")


def test_tensors_without_dims_or_values():
    assert difference(torch.tensor(3), torch.tensor(3)) is None
    assert str(difference(torch.tensor(3), torch.tensor(4))) == "in 1 of 1 rows (0), by 1 at most"
    assert difference(torch.empty(0, 3), torch.empty(0, 3)) is None


def test_layout_does_not_matter():
    x = torch.randn(3, 4, 2)
    assert difference(x.transpose(0, 2).contiguous().transpose(0, 2), x) is None
    assert same_bits(torch.ones(1).expand(5), torch.ones(5))
