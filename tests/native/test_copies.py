"""ApartCheck and GroupedCopy, in Python and in C++."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphcap.native import fallback
from tests.native.conftest import built


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_apart(checks: ModuleType) -> None:
    cache, other, x = torch.zeros(4, 2), torch.zeros(3), torch.ones(2)
    apart = checks.ApartCheck([1, 2], [storage(cache), storage(other)])
    assert apart((cache, x, x)) is True, "only the indices matter"
    assert apart([None, x, cache[1]]) is False, "a row lies in the storage of the whole"
    assert apart((None, other, x)) is False
    assert apart((None, x)) is False
    assert apart((None, x, 3)) is False
    assert apart((None, x, x.to_sparse())) is False
    assert checks.ApartCheck([], [])(()) is True


def test_copies_what_the_indices_name(checks: ModuleType) -> None:
    first, second = torch.zeros(2), torch.zeros(2, 2)
    copy = checks.GroupedCopy([first, second[:1]], [2, 0])
    assert copy((torch.full((1, 2), 5.0), None, torch.tensor([3.0, 4.0]))) is None
    assert first.tolist() == [3.0, 4.0]
    assert second.tolist() == [[5.0, 5.0], [0.0, 0.0]]


def test_autograd_does_not_see_a_copy(checks: ModuleType) -> None:
    target = torch.zeros(2)
    checks.GroupedCopy([target], [0])([torch.ones(2, requires_grad=True)])
    assert target.tolist() == [1.0, 1.0]
    assert target.grad_fn is None
    assert not target.requires_grad


def test_copies_between_inference_mode_and_not(checks: ModuleType) -> None:
    target = torch.zeros(2)
    copy = checks.GroupedCopy([target], [0])
    with torch.inference_mode():
        source = torch.ones(2)
        copy([source])
    assert target.tolist() == [1.0, 1.0]
    copy([source * 2])
    assert target.tolist() == [2.0, 2.0]


def test_what_does_not_fit(checks: ModuleType) -> None:
    copy = checks.GroupedCopy([torch.zeros(2)], [1])
    with pytest.raises(TypeError, match="argument 1: expected a tensor, got None"):
        copy([torch.zeros(2)])
    with pytest.raises(TypeError, match="argument 1: expected a tensor, got 3"):
        copy([None, 3])
    with pytest.raises(RuntimeError):
        copy([None, torch.zeros(3)])
    with pytest.raises(TypeError, match="takes one argument"):
        copy(torch.zeros(2))
    with pytest.raises(TypeError, match="target 0: expected a tensor"):
        checks.GroupedCopy([None], [0])
    with pytest.raises(ValueError, match="1 targets, but 2 indices"):
        checks.GroupedCopy([torch.zeros(2)], [0, 1])
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        checks.ApartCheck([-1], [])


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=4), st.booleans())
def test_both_implementations_agree(pairs: list[tuple[int, int]], is_tuple: bool) -> None:
    extension = built()
    if isinstance(extension, str):
        pytest.skip(extension)
    results = []
    for checks in (fallback, extension):
        args = [torch.full((2,), float(value)) for value in range(5)]
        targets = [torch.zeros(2) for _ in range(4)]
        given = tuple(args) if is_tuple else args
        checks.GroupedCopy([targets[target] for target, _ in pairs], [index for _, index in pairs])(given)
        apart = checks.ApartCheck([index for _, index in pairs], [storage(args[0]), storage(args[4])])(given)
        results.append(([target.tolist() for target in targets], apart))
    assert results[0] == results[1]
