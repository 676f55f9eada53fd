"""What the tests of the ways in share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from graphcap.compiler.frontend import target as targets


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """Every graph that Dynamo hands to the backend; they run as they are."""
    seen: list[torch.fx.GraphModule] = []

    def recording(gm: torch.fx.GraphModule, inputs: Any, **kwargs: Any) -> Callable[..., Any]:
        seen.append(gm)
        return gm.forward

    monkeypatch.setattr(targets, "backend", lambda: recording)
    return seen
