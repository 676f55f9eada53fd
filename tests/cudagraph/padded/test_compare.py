"""How far two results are apart, and what is more than rounding."""

from __future__ import annotations

import pytest
import torch

from graphcap.cudagraph.padded import compare
from graphcap.cudagraph.padded.compare import departs, distance

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
