"""What a plan is taken to need."""

from __future__ import annotations

import pytest

from graphcap.cudagraph.hardware.needs import Needs


def needs(**taken: int) -> Needs:
    found = Needs()
    for rows, num_bytes in taken.items():
        found.note("kind", int(rows[1:]), num_bytes)
    return found


@pytest.mark.parametrize(
    ("taken", "rows", "guess"),
    [
        ({}, 8, 0),
        ({"n8": 800}, 4, 0),
        ({"n8": 800}, 8, 800),
        ({"n8": 800}, 16, 800),
        ({"n8": 800, "n16": 1600}, 4, 400),
        ({"n8": 800, "n16": 800}, 4, 800),
        ({"n8": 300, "n16": 1600}, 4, 0),
        ({"n8": 800, "n16": 1600}, 12, 1200),
        ({"n8": 800, "n16": 1600}, 64, 1600),
    ],
)
def test_what_a_plan_is_taken_to_need(taken: dict[str, int], rows: int, guess: int) -> None:
    assert needs(**taken).guess("kind", rows) == guess


def test_kinds_say_nothing_about_each_other() -> None:
    assert needs(n8=800).guess("another", 16) == 0


def test_the_latest_counts() -> None:
    found = needs(n8=800)
    found.note("kind", 8, 500)
    assert found.guess("kind", 8) == 500
