"""How figures are written in Markdown, and where they come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]


def whole(value: float) -> str:
    return f"{value:.0f}"


def tenth(value: float) -> str:
    return f"{value:.1f}"


def hundredth(value: float) -> str:
    return f"{value:.2f}"


def factor(value: float) -> str:
    return f"{value:.3f}"


def error(value: float) -> str:
    return f"{value:.1e}"


def line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def environment_line(content: Row) -> str:
    """Where the figures come from, in one sentence."""
    environment = content["environment"]
    versions = ", ".join(
        f"{name} {environment[name]}"
        for name in ("driver", "torch", "triton", "transformers", "python")
        if environment.get(name)
    )
    dates = sorted({row["date"] for row in content["rows"]})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return (
        f"Measured by `bench/{content['bench']}.py` on {environment['device']} ({versions}), {when},"
        f" commit {environment['commit']}."
    )
