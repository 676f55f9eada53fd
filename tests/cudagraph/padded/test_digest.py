"""Digests: any change of a page is seen in its number, and in no other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphcap.cudagraph.padded import digest as module
from graphcap.cudagraph.padded.digest import digest, digests

PAGE = 64


def some_bytes(num_bytes: int) -> torch.Tensor:
    return torch.randint(256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@given(st.integers(1, 999), st.data())
@settings(max_examples=50)
def test_one_byte_changes_the_number_of_its_page(num_bytes: int, data: st.DataObject) -> None:
    memory = some_bytes(num_bytes)
    before = digests(memory, PAGE)
    at = data.draw(st.integers(0, num_bytes - 1))
    memory[at] ^= data.draw(st.integers(1, 255))
    differs = digests(memory, PAGE) != before
    assert differs.nonzero().flatten().tolist() == [at // PAGE]


def test_words_that_change_places_are_seen() -> None:
    """A sum would be the same."""
    memory = some_bytes(PAGE)
    words = memory.view(torch.int64)
    before = digests(memory, PAGE)
    words[[0, 3]] = words[[3, 0]]
    assert digests(memory, PAGE) != before


def test_parts_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = some_bytes(10 * PAGE + 3)
    whole = digests(memory, PAGE)
    assert len(whole) == 11
    monkeypatch.setattr(module, "_PART_BYTES", 2 * PAGE)
    assert torch.equal(digests(memory, PAGE), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64, torch.complex64])
def test_a_tensor_is_told_from_one_with_another_element(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PART_BYTES", 128)
    tensor = torch.zeros(3, 40, 5).to(dtype)
    assert digest(tensor) == digest(tensor.clone()) == digest(tensor.transpose(0, 2).contiguous().transpose(0, 2))
    for at in [(0, 0, 0), (2, 39, 4), (1, 17, 2)]:
        other = tensor.clone()
        other[at] = 1
        assert digest(other) != digest(tensor)
    assert digest(tensor[:0]) == 0
