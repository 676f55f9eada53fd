"""A profile as plain text: where time was lost first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from graphcap.compiler.debug.rows import WIDTH, count, wrap

if TYPE_CHECKING:
    from graphcap.compiler.debug.profile import Profile, ProfileRow

_SHOWN = 24
_WAYS = f"{'eager':>9} {'compiled':>9} {'replayed':>9} {'live':>9} {'lost':>9}"

_LEGEND = (
    "lost: what the fastest other way would save. Each step was timed alone, replayed from a graph of its own; in the "
    "plan neighbours share a graph, and the host runs ahead of the device."
)


def table(profile: Profile) -> str:
    """The whole profile."""
    return "\n".join(_lines(profile))


def _lines(profile: Profile) -> Iterator[str]:
    if profile.message:
        yield from wrap(f"graphcap profile of {profile.target}: {profile.message}", "", "  ")
        return
    steps = sum(row.us for row in profile.rows)
    live = sum(row.us for row in profile.rows if row.replayed_us is None)
    lost = sum(row.lost_us for row in profile.rows)
    timed = f"{count(len(profile.rows), 'step')}, medians of {profile.repeats} calls in us"
    yield f"graphcap profile of {profile.target}: {timed}"
    alone = f"its steps one by one {steps:.1f}, {live:.1f} of them live"
    yield f"  the call as it is {profile.call_us:.1f}; {alone}; lost {lost:.1f}"
    if profile.device == "simulated":
        yield "  on the simulated device: a test of the logic, it says nothing about speed"
    yield f"  {'step':<12} {_WAYS}  where"
    for row in profile.rows[:_SHOWN]:
        yield f"  {_row(row)}"[:WIDTH]
    if len(profile.rows) > _SHOWN:
        rest = profile.rows[_SHOWN:]
        yield f"  ... and {len(rest)} more, {sum(row.us for row in rest):.1f} us"
    yield from wrap(_LEGEND, "  ", "  ")


def _row(row: ProfileRow) -> str:
    times = (row.eager_us, row.compiled_us, row.replayed_us, row.live_us, row.lost_us or None)
    return f"{row.step:<12} {' '.join(_us(each) for each in times)}  {row.where or '-'}"


def _us(value: float | None) -> str:
    return f"{value:>9.1f}" if value is not None else f"{'-':>9}"
