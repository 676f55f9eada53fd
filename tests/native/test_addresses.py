"""AddressCheck, in Python and in C++."""

from __future__ import annotations

import gc
import sys
import weakref
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from graphcap.native import AddressCheck, fallback
from tests.native.conftest import built


def check_of(checks: ModuleType, *tensors: torch.Tensor) -> AddressCheck:
    check: AddressCheck = checks.AddressCheck(range(len(tensors)), [tensor.data_ptr() for tensor in tensors])
    return check


def test_holds_for_the_same_memory(checks: ModuleType) -> None:
    weight, parameter = torch.ones(4), nn.Parameter(torch.ones(4))
    check = check_of(checks, weight, parameter)
    assert check((weight, parameter)) is True
    assert check([weight, parameter, "further arguments do not matter"]) is True
    assert check((weight.view(2, 2), parameter.detach())) is True, "another tensor at the same address"
    assert check((parameter, weight)) is False
    assert checks.AddressCheck([], [])(()) is True


def test_looks_only_at_the_indices(checks: ModuleType) -> None:
    weight = torch.ones(4)
    check = checks.AddressCheck([2], [weight.data_ptr()])
    assert check((None, 7, weight))
    assert not check((weight, weight, None))


def test_moved_data(checks: ModuleType) -> None:
    parameter = nn.Parameter(torch.ones(4))
    check = check_of(checks, parameter)
    before = parameter.data
    parameter.data = torch.ones(4)
    assert not check((parameter,))
    parameter.data = before
    assert check((parameter,))


def test_offset_into_a_storage(checks: ModuleType) -> None:
    buffer = torch.arange(8.0)
    check = check_of(checks, buffer[2:])
    assert check((buffer[2:5],))
    assert not check((buffer,))


@pytest.mark.parametrize("value", [None, 3, "text", object(), Mock(spec=torch.Tensor), [torch.ones(1)]])
def test_no_tensor(checks: ModuleType, value: Any) -> None:
    assert checks.AddressCheck([0], [0])((value,)) is False


def test_too_few_arguments(checks: ModuleType) -> None:
    assert checks.AddressCheck([1], [0])((torch.ones(1),)) is False


def test_tensors_without_an_address(checks: ModuleType) -> None:
    check = checks.AddressCheck([0], [0])
    assert check((torch.ones(2, 2).to_sparse(),)) is False
    inside = []
    torch.vmap(lambda row: inside.append(check((row,))) or row)(torch.ones(2, 3))
    assert inside == [False]


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # in Python, once per process
def test_fake_tensor(checks: ModuleType) -> None:
    check = check_of(checks, torch.ones(4))
    with FakeTensorMode():
        fake = torch.empty(4)
    assert check((fake,)) is False


def test_address_zero(checks: ModuleType) -> None:
    """Empty and meta tensors begin nowhere, as data_ptr() says."""
    empty, meta = torch.empty(0), torch.empty(3, device="meta")
    check = check_of(checks, empty, meta)
    assert check((empty, meta))
    assert check((torch.ones(3)[:0], meta))
    assert not check((torch.ones(1), meta))


def test_copy_on_write(checks: ModuleType) -> None:
    """A graph that writes to the address would write to the clone as well."""
    tensor = torch.ones(4)
    check = check_of(checks, tensor)
    clone = torch._lazy_clone(tensor)
    assert not check((tensor,)) or not check((clone,))
    tensor.add_(1)
    assert clone.tolist() == [1, 1, 1, 1]


def test_extension_leaves_a_copy_on_write_tensor_as_it_is() -> None:
    extension = built()
    if isinstance(extension, str):
        pytest.skip(extension)
    tensor = torch.ones(4)
    check = check_of(extension, tensor)
    clone = torch._lazy_clone(tensor)
    assert not check((tensor,))
    assert not check((clone,))
    assert torch._C._is_cow_tensor(tensor)
    assert torch._C._is_cow_tensor(clone)


def test_refers_to_nothing(checks: ModuleType) -> None:
    tensor = torch.ones(4)
    check, args = check_of(checks, tensor), (tensor,)
    counts = sys.getrefcount(tensor), sys.getrefcount(args), sys.getrefcount(True), sys.getrefcount(type(check))
    for _ in range(1000):
        check(args)
        checks.AddressCheck([0], [1])(args)
    after = sys.getrefcount(tensor), sys.getrefcount(args), sys.getrefcount(True), sys.getrefcount(type(check))
    assert all(abs(now - then) < 100 for now, then in zip(after, counts, strict=True))
    ref = weakref.ref(tensor)
    del tensor, args
    gc.collect()
    assert ref() is None


def test_refuses(checks: ModuleType) -> None:
    with pytest.raises(ValueError, match="2 indices, but 1 addresses"):
        checks.AddressCheck([0, 1], [0])
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        checks.AddressCheck([-1], [0])
    with pytest.raises(TypeError):
        checks.AddressCheck(["0"], [0])
    check = checks.AddressCheck([0], [0])
    for args in [(), (None,), ((), ()), ({0: 1},)]:
        with pytest.raises(TypeError):
            check(*args)
    with pytest.raises(TypeError):
        check(args=())


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=8), st.lists(st.integers(0, 3), max_size=6))
def test_both_implementations_agree(expected: list[tuple[int, int]], given: list[int]) -> None:
    """Expected: index and tensor; given: which tensor is at each index."""
    extension = built()
    if isinstance(extension, str):
        pytest.skip(extension)
    tensors = [torch.ones(1), torch.ones(2), torch.empty(0), torch.ones(3)]
    indices, addresses = [index for index, _ in expected], [tensors[which].data_ptr() for _, which in expected]
    args = tuple(tensors[which] for which in given)
    truth = all(i < len(args) and args[i].data_ptr() == address for i, address in zip(indices, addresses, strict=True))
    for checks in (fallback, extension):
        assert checks.AddressCheck(indices, addresses)(args) is truth
