"""How the tests of guards call what they have compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import graphcap
from graphcap.compiler.frontend.api import record_of
from graphcap.compiler.frontend.target import CompiledTarget


def rows(num_rows: int = 3) -> Tensor:
    return torch.randn(num_rows, 4)


def eager(compiled: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with graphcap.disabled():
        return compiled(*args, **kwargs)


def target_of(compiled: Any) -> CompiledTarget:
    found = record_of(compiled)
    assert found is not None
    return found


def assert_right(compiled: Any, *args: Any, **kwargs: Any) -> None:
    expected = eager(compiled, *args, **kwargs)
    torch.testing.assert_close(compiled(*args, **kwargs), expected, rtol=0, atol=0)
