"""The ways into graphcap that the benches use, from a checkout that is not installed as well."""

from __future__ import annotations

import importlib
import tomllib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

import graphcap

Backend = str | Callable[..., Any]


def backend() -> Backend:
    """``"graphcap"`` where the package is installed, otherwise the function that its entry point names."""
    if "graphcap" in torch._dynamo.list_backends():
        return "graphcap"
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    module, _, attribute = project["entry-points"]["torch_dynamo_backends"]["graphcap"].partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return found


def device_options(device: torch.device) -> dict[str, Any]:
    """On a CPU the graph runtime runs on the simulated device: it shows that the path works, never how fast it is."""
    known = {field.name for field in fields(graphcap.Config)}
    return {"simulate": True} if device.type == "cpu" and "simulate" in known else {}


def require_whole_graphs(target: object) -> None:
    """See that a FULL variant is one: whatever its plans run live would be timed under a wrong name.

    Raises:
        RuntimeError: something runs live, with the reason.
    """
    plans = [plan for region in graphcap.explain(target).regions for plan in region.plans]
    if not plans:
        raise RuntimeError("nothing is captured")
    for plan in plans:
        for name, reason in plan.live.items():
            raise RuntimeError(f"{name} runs live in a FULL plan: {reason}")


def report_text(target: object) -> str:
    """What ``graphcap.explain`` says about a compiled model, or why it says nothing."""
    try:
        return str(graphcap.explain(target))
    except Exception as error:  # the report must not cost a measurement
        return f"(no report: {type(error).__name__}: {error})"
