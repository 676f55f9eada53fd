"""A function captured without Dynamo may not differ from the function in anything that its caller can see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import graphcap
from graphcap.compiler.breakable.target import BreakableTarget
from graphcap.compiler.debug.report import RegionReport
from graphcap.compiler.frontend.api import record_of
from tests.compiler.like_eager import Inputs, compare, observe

CALLS = 8  #: two are recorded, one warms up, one captures, two replays are compared, two are not


def breakable(target: Any, **options: Any) -> Any:
    """The target on the simulated device."""
    return graphcap.compile(target, frontend="breakable", simulate=True, **options)


def assert_like_original(
    make_model: Callable[[], Callable[..., Any]],
    make_inputs: Inputs,
    *,
    calls: int = CALLS,
    replayed: bool = True,
    grad_mode: Callable[[int], Any] = lambda call: torch.no_grad(),
    **options: Any,
) -> tuple[RegionReport, ...]:
    """Run a fresh model as it is and a fresh one captured over the same calls; compare all that is visible, bitwise.

    Returns:
        What the report says of the regions.
    """
    torch.manual_seed(0)
    original = make_model()
    torch.manual_seed(0)
    twin = make_model()
    captured = breakable(twin, **options)
    seen = []
    for call in range(calls):
        with grad_mode(call):
            expected = observe(original, original, make_inputs, call)
            got = observe(captured, twin, make_inputs, call)
        compare(got, expected, 0.0, f"call {call}")
        seen.append(got)
    for call, got in enumerate(seen):
        for leaf, copy in got.own_results():
            torch.testing.assert_close(leaf, copy, rtol=0, atol=0, equal_nan=True, msg=f"call {call}: overwritten")
    regions = graphcap.explain(captured).regions
    reasons = [(each.bypass, each.failures, each.live_calls) for each in regions]
    assert not replayed or any(each.replays >= 2 for each in regions), reasons
    assert not replayed or not any(each.bypass or each.failures for each in regions), reasons
    return regions


def refused(target: Any) -> str:
    """Why the only key of a target runs as it is; fails where it does not."""
    (region,) = graphcap.explain(target).regions
    assert region.bypass, "was not refused"
    assert region.replays == 0
    return region.bypass


def num_replays(target: Any) -> int:
    return sum(region.replays for region in graphcap.explain(target).regions)


def target_of(compiled: Any) -> BreakableTarget:
    record = record_of(compiled)
    assert isinstance(record, BreakableTarget)
    return record


class Mlp(nn.Module):
    """``[num_tokens, 4]`` in and out, with a counter in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return self.drop(torch.relu(self.fc(x)))


def rows(num_rows: int = 3) -> torch.Tensor:
    return torch.randn(num_rows, 4)
