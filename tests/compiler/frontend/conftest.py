"""What the tests of the ways in share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from graphcap.compiler.frontend import target as targets
from graphcap.compiler.frontend.guards import ArgumentGuards


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """Every graph that Dynamo hands to the backend; they run as they are."""
    seen: list[torch.fx.GraphModule] = []

    def recording(gm: torch.fx.GraphModule, inputs: Any, **kwargs: Any) -> Callable[..., Any]:
        seen.append(gm)
        return gm.forward

    monkeypatch.setattr(targets, "backend", lambda: recording)
    return seen


@pytest.fixture
def answers_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[type], list[bool]]:
    """A function that takes a kind of guards and returns what such guards say, each time that they are evaluated."""

    def answers(kind: type) -> list[bool]:
        seen: list[bool] = []
        evaluate: Callable[..., bool] = kind.__call__

        def recording(self: Any, f_locals: dict[str, Any]) -> bool:
            seen.append(evaluate(self, f_locals))
            return seen[-1]

        monkeypatch.setattr(kind, "__call__", recording)
        return seen

    return answers


@pytest.fixture
def evaluations(answers_of: Callable[[type], list[bool]]) -> list[bool]:
    """What the guards on arguments said, each time that they were evaluated."""
    return answers_of(ArgumentGuards)
