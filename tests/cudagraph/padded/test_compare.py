"""How far two results are apart, and what is more than rounding."""

from __future__ import annotations

import pytest
import torch

from graphcap.cudagraph.padded import compare
from graphcap.cudagraph.padded.compare import departs, distance, is_finite

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1.0, NAN, INF], [1.0, NAN, INF], 0.0),
        ([0.0], [-0.0], 0.0),
        ([1.0, 2.0], [1.0, 2.5], 0.5),
        ([NAN], [1.0], INF),
        ([INF], [1.0], INF),
        ([INF], [-INF], INF),
        ([3], [3], 0.0),
        ([3], [4], INF),
        ([True], [False], INF),
        ([1 + 2j], [1 + 1j], 1.0),
        ([], [], 0.0),
    ],
)
def test_distance(a: list[complex], b: list[complex], expected: float) -> None:
    assert distance(torch.tensor(a), torch.tensor(b)) == expected


@pytest.mark.parametrize("part", [4, 2**24])
def test_one_row_that_is_wrong_departs_however_many_are_right(monkeypatch: pytest.MonkeyPatch, part: int) -> None:
    monkeypatch.setattr(compare, "_PART", part)
    torch.manual_seed(0)
    truth = torch.randn(64, 2, 8)
    rounded = truth.bfloat16() * 1.01
    assert not departs(rounded, truth.bfloat16())
    assert not departs(truth * (1 + 1e-4), truth)
    wrong = truth.clone()
    wrong[63, 1] = truth[63, 1] * 2
    assert departs(wrong, truth)
    assert departs(wrong.bfloat16(), truth.bfloat16())
    assert distance(wrong, truth) == (wrong - truth).abs().max().double()


def test_a_row_that_was_empty_departs() -> None:
    truth = torch.randn(8, 4)
    truth[3] = 0
    value = truth.clone()
    value[3, 1] = 1
    assert departs(value, truth)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.float64])
def test_every_float_can_be_compared(dtype: torch.dtype) -> None:
    values = torch.randn(4, 4).to(dtype)
    assert distance(values, values.clone()) == 0.0
    assert not departs(values, values.clone())
    other = (values.float() + 4).to(dtype)
    assert distance(values, other) > 0
    assert departs(values, other)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.complex64, torch.uint8])
@pytest.mark.parametrize("shape", [(1024,), (16, 64), (4, 16, 16)])
def test_nothing_large_is_made_of_a_large_tensor(
    dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache that fills the device leaves no room for it in another dtype."""
    largest = []

    def noting(tensor: torch.Tensor) -> torch.Tensor:
        largest.append(tensor.numel())
        return comparable(tensor)

    comparable = compare._comparable
    monkeypatch.setattr(compare, "_comparable", noting)
    monkeypatch.setattr(compare, "_PART", 64)
    values = torch.ones(shape).to(dtype)
    other = values.clone()
    other[-1] = 3
    assert departs(other, values)
    assert distance(values, other) == (2.0 if dtype.is_floating_point or dtype.is_complex else INF)
    assert not departs(values, values.clone())
    assert is_finite(values)
    assert max(largest) <= 64


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.bool, torch.int64, torch.complex64])
def test_equal_tensors_take_one_look_for_many_elements(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    plain = torch.equal
    monkeypatch.setattr(torch, "equal", lambda a, b: looks.append(a.numel()) or plain(a, b))
    monkeypatch.setattr(compare, "_PART", 64)
    values = torch.ones(16, 64).to(dtype)
    assert distance(values, values.clone()) == 0.0
    assert not departs(values, values.clone())
    assert looks == [64] * (2 * values.nbytes // 8 // 64), "words of eight bytes, whatever they hold"


@pytest.mark.parametrize("part", [slice(0, 8), slice(1, 9), slice(0, 7), slice(0, 16, 2)])
@pytest.mark.parametrize("changed", [None, 0, -1])
def test_parts_of_a_tensor_are_compared_alone(part: slice, changed: int | None) -> None:
    """Wherever they begin and end: what lies beside them does not count."""
    values = torch.randn(16).half()
    one, other = values.clone(), torch.full_like(values, NAN)
    other[part] = values[part]
    if changed is not None:
        other[part][changed] += 1
    assert (distance(one[part], other[part]) > 0) == (changed is not None)
    assert departs(other[part], one[part]) == (changed is not None)


@pytest.mark.parametrize("value", [NAN, INF, -INF, 1.0])
@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float32, torch.complex64])
def test_what_is_finite(value: float, dtype: torch.dtype) -> None:
    values = torch.zeros(3, 4).to(dtype)
    values[2, 3] = value
    assert is_finite(values) == (value == 1.0)
    assert is_finite(torch.ones(3, dtype=torch.int64))
