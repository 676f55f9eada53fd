"""Views of what is not computed yet stay views where a size has no example."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
import torch._inductor.ir as ir
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import graphcap
from graphcap.compiler.private import views

SYMBOLS = {sympy.Symbol("u0", integer=True): 3, sympy.Symbol("u1", integer=True): 2}


def split(draw: st.DrawFn, number: int) -> list[int]:
    """Sizes with this product, ones among them."""
    sizes = []
    while number > 1:
        size = draw(st.sampled_from([d for d in range(2, number + 1) if number % d == 0]))
        sizes.append(size)
        number //= size
    for _ in range(draw(st.integers(0, 2))):
        sizes.insert(draw(st.integers(0, len(sizes))), 1)
    return sizes


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[list[Any], list[Any]]:
    old, new = [], []
    symbols = draw(st.permutations(list(SYMBOLS)))[: draw(st.integers(0, 2))]
    for symbol in [*symbols, None]:
        number = draw(st.sampled_from([1, 2, 4, 6, 12]))
        old += [*split(draw, number), *([symbol] if symbol is not None else [])]
        new += [*split(draw, number), *([symbol] if symbol is not None else [])]
    return old, new


def concrete(sizes: list[Any]) -> list[int]:
    return [SYMBOLS.get(size, size) for size in sizes]


@given(reshapes())
def test_indices_of_a_reshape(reshape: tuple[list[Any], list[Any]]) -> None:
    old, new = reshape
    reindex = views.reindexer(old, new)
    assert reindex is not None
    x = torch.arange(math.prod(concrete(old))).reshape(concrete(old))
    y = x.reshape(concrete(new))
    for index in itertools.product(*map(range, concrete(new))):
        assert x[tuple(int(each) for each in reindex(index))] == y[index]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((sympy.Symbol("u0"), 4), (4, sympy.Symbol("u0"))),
        ((sympy.Symbol("u0"), 4), (sympy.Symbol("u0") * 4,)),
        ((sympy.Symbol("u0"), sympy.Symbol("u1")), (sympy.Symbol("u1"), sympy.Symbol("u0"))),
        ((sympy.Symbol("u0"), 0), (0, sympy.Symbol("u0"))),
    ],
)
def test_what_is_not_plain_is_left_to_inductor(old: tuple[Any, ...], new: tuple[Any, ...]) -> None:
    assert views.reindexer(old, new) is None


class Masked(torch.nn.Module):
    def forward(self, x: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        real = (slots >= 0)[:, None, None]
        heads = (x * 2).view(-1, 2, 4)
        return torch.where(real, heads, 0), torch.where(real, heads + 1, 0).flatten(1)


def test_a_mask_for_two_readers_is_no_kernel_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []
    plain = views.reindexer
    monkeypatch.setattr(views, "IS_NEEDED", True)
    monkeypatch.setattr(views, "reindexer", lambda old, new: asked.append((old, new)) or plain(old, new))
    before = ir.View.__dict__["create"]
    dims = {"x": {0: "n"}, "slots": {0: "n"}}
    model = graphcap.compile(Masked().eval(), dynamic_arg_dims=dims, cache=False, debug_dir=str(tmp_path))
    for rows in (3, 1, 7):
        x, slots = torch.randn(rows, 8), torch.randint(-1, 3, (rows,))
        with torch.no_grad():
            found = model(x, slots)
        torch.testing.assert_close(found, Masked()(x, slots))
    assert asked
    assert ir.View.__dict__["create"] is before
    (code,) = tmp_path.glob("**/*.inductor.py")
    assert not re.search(r"empty_strided_\w+\(\(u0, *\)", code.read_text()), "the mask lies in memory"
