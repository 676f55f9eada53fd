"""Labelled, wrapped lines of plain text, as a report is made of."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

WIDTH = 110
LABEL = 14  # columns of the names on the left
_GLUE = "\u00a0"  # a blank at which no line is broken
_SHOWN_NAMES = 4


def row(label: str, text: str) -> Iterator[str]:
    """A label on the left and its text beside it."""
    return wrap(f"{label:<{LABEL}}{text}", "  ", " " * (LABEL + 2))


def wrap(text: str, first: str, later: str) -> Iterator[str]:
    """Lines of at most :data:`WIDTH` columns; runs of blanks within a line survive, as they align columns."""
    lines = textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=later, break_on_hyphens=False)
    yield from (line.replace(_GLUE, " ") for line in lines)


def duration(seconds: float) -> str:
    """``"1.25 s"``."""
    return f"{seconds:.2f}{_GLUE}s"


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return ", ".join(names[:_SHOWN_NAMES]) + more


def count(number: int, one: str, many: str = "") -> str:
    """``"1 piece"``, ``"2 pieces"``; ``many`` for a plural that does not end in s."""
    return f"{number} {one if number == 1 else many or one + 's'}"
