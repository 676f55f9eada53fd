"""How far rounding moves values, and what that excuses."""

from __future__ import annotations

import math

import pytest
import torch

from graphcap.cudagraph.checks.differences import NARROW_TOLERANCE
from graphcap.cudagraph.checks.rounding import TooUnsteady, beyond_rounding, nudged, spread

FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", FLOATS)
def test_one_in_16_floats_moves_by_its_last_bit(dtype):
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = x.clone()
    (moved,) = nudged([x], others=())
    assert torch.equal(x, before)
    steps = (moved.double() - x.double()).abs() / x.double().abs()
    assert (steps > 0).double().mean().item() == pytest.approx(1 / 16, rel=0.2)
    assert steps.max().item() <= 2 * torch.finfo(dtype).eps
    assert 0.4 < (moved > x).sum().item() / (moved != x).sum().item() < 0.6


def test_what_has_no_last_bit_stays():
    odd = torch.tensor([0.0, float("inf"), float("nan")]).repeat(100)
    numbers = torch.arange(300)
    moved, *others = nudged([odd, numbers, None, 3], others=())
    assert torch.equal(moved.nan_to_num(7.0), odd.nan_to_num(7.0))
    assert [each is other for each, other in zip(others, [numbers, None, 3], strict=True)] == [True] * 3


def test_memory_of_others_is_left_alone_and_results_that_share_memory_share_the_copy():
    theirs, own = torch.ones(1000), torch.ones(1000)
    same, tail, matrix = nudged([theirs, own[10:], own.view(10, 100).t()], [theirs[:3]])
    assert same is theirs
    assert torch.equal(own, torch.ones(1000))
    assert 0 < (tail != 1).sum().item() < 200
    assert (matrix.shape, matrix.stride()) == ((100, 10), (1, 100))
    tail.zero_()
    assert matrix.t().flatten()[10:].abs().sum() == 0


def test_random_numbers_of_the_program_are_not_used_up():
    torch.manual_seed(0)
    nudged([torch.ones(1000)], others=())
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(1))


def test_spread_is_relative_to_the_largest_of_the_row():
    settled = torch.tensor([[1.0, 100.0], [1.0, 2.0]])
    assert spread(settled, settled.clone()) == 0.0
    assert spread(settled, settled + torch.tensor([[1.0, 0.0], [0.0, 0.5]])) == 0.25
    assert spread(torch.zeros(2, 2), torch.zeros(2, 2)) == 0.0
    assert spread(torch.tensor([3]), torch.tensor([4])) == math.inf
    assert spread(settled, torch.zeros(3)) == math.inf
    assert (spread(3, 3), spread(3, 4)) == (0.0, math.inf)


def test_twice_the_spread_passes_and_what_rounding_moves_too_far_says_nothing():
    expected = torch.ones(2, 4, dtype=torch.bfloat16)
    actual = expected * 1.125
    assert NARROW_TOLERANCE < 0.125
    assert beyond_rounding("it", expected, actual, 0.0) is not None
    assert beyond_rounding("it", expected, actual, 0.05) is not None
    assert beyond_rounding("it", expected, actual, 0.07) is None
    with pytest.raises(TooUnsteady, match="rounding alone changes it"):
        beyond_rounding("it", expected, actual, 0.3)
