"""What Dynamo is given to trace: code objects of their own, and arguments under their names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import trace_rules

from graphcap.compiler.frontend.entry import function_entry, module_entry, parameter_source


class Scale(nn.Module):
    def forward(self, x: Tensor, factor: float = 2.0) -> Tensor:
        return x * factor


def double(x: Tensor, *, times: int = 2) -> Tensor:
    """Twice as much."""
    return x * times


def test_no_two_entries_share_code() -> None:
    codes = [module_entry(Scale).__code__, module_entry(Scale).__code__]
    codes += [function_entry(double).__code__, function_entry(double).__code__, double.__code__]  # type: ignore[arg-type]
    assert len(set(codes)) == len(codes)


def test_entries_do_what_the_original_does() -> None:
    x, scale = torch.ones(2), Scale()
    assert torch.equal(module_entry(Scale)(scale, x, factor=3.0), scale(x, factor=3.0))
    assert torch.equal(function_entry(double)(x), double(x))  # type: ignore[arg-type]
    decorated = torch.no_grad()(double)
    assert torch.equal(function_entry(decorated)(x, times=5), decorated(x, times=5))


@pytest.mark.parametrize(
    ("code", "qualname", "written"),
    [
        (module_entry(Scale).__code__, "Scale.forward", Scale.forward.__code__),
        (function_entry(double).__code__, "double", double.__code__),  # type: ignore[arg-type]
        (function_entry(torch.no_grad()(double)).__code__, "double", double.__code__),
    ],
)
def test_an_entry_says_where_the_original_was_written(code: Any, qualname: str, written: Any) -> None:
    assert code.co_qualname == qualname
    assert (code.co_filename, code.co_firstlineno) == (written.co_filename, written.co_firstlineno)


def test_an_entry_of_torchs_own_module_is_one_that_dynamo_traces_itself() -> None:
    """What seems to be written in torch, Dynamo puts into a wrapper that all such modules share."""
    code = module_entry(nn.Sequential).__code__
    assert code.co_qualname == "Sequential.forward"
    assert not trace_rules.check(code)
    assert trace_rules.check(nn.Sequential.forward.__code__)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("L['args'][0]", "L['x']"),
        ("L['args'][1]", "L['y']"),
        ("L['args'][0]['ids']", "L['x']['ids']"),
        ("L['args'][2]", "L['args'][2]"),
        ("L['args'][9]", "L['args'][9]"),
        ("L['kwargs']['z']", "L['z']"),
        ("L['kwargs']['z'].ids", "L['z'].ids"),
        ("L['self']._modules['fc']", "L['self']._modules['fc']"),
        ("L['x']", "L['x']"),
    ],
)
def test_arguments_are_named_after_their_parameters(source: str, expected: str) -> None:
    def forward(x: Any, y: Any, *rest: Any, z: Any, **more: Any) -> None: ...

    assert parameter_source(source, forward) == expected
