"""Random straight-line programs: arithmetic, copies, writes in place and views, every value ``[4, 4]``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

#: A name and the two values that it reads.
Operation = tuple[str, int, int]

#: Each operation reads values by index (modulo how many there are) and appends one value or writes one in place.
UNARY = ("sin", "neg", "contiguous")
BINARY = ("add", "mul", "matmul", "cat")
IN_PLACE = ("add_", "mul_", "copy_", "setitem")
VIEWS = ("t", "view", "narrow")
OPERATIONS = st.lists(
    st.tuples(st.sampled_from(UNARY + BINARY + IN_PLACE + VIEWS), st.integers(0, 99), st.integers(0, 99)),
    min_size=1,
    max_size=14,
)


def random_program(operations: list[Operation]) -> Callable[..., Any]:
    """A function of two ``[4, 4]`` tensors, every intermediate value of which is ``[4, 4]``."""

    def program(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        values = [x * 1, y]
        for name, i, j in operations:
            a, b = values[i % len(values)], values[j % len(values)]
            if name in UNARY:
                values.append(getattr(a, name)())
            elif name == "cat":
                values.append(torch.cat([a[:2], b[2:]]))
            elif name in BINARY:
                values.append(getattr(torch, name)(a, b))
            elif name == "setitem":
                a[i % 4] = j % 7
            elif name == "copy_":
                a.copy_(b.clone())
            elif name in IN_PLACE:
                getattr(a, name)(0.5)
            elif name == "t":
                values.append(a.t())
            elif name == "view":
                values.append(a.view(4, 4) if a.is_contiguous() else a)
            else:
                values.append(a.narrow(0, 0, 4))
        return tuple(values[-3:])

    return program
