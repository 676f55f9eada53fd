"""A method is another one while somebody is inside, and afterwards as it was."""

from __future__ import annotations

import pytest

from graphcap.compiler.private.patched import Patched


class Plain:
    def name(self) -> str:
        return "plain"


def test_the_last_one_to_leave_puts_it_back() -> None:
    before = Plain.__dict__["name"]
    patched = Patched("name", lambda plain: lambda self: f"not {plain(self)}")
    first, second = patched.within(Plain), patched.within(Plain)
    first.__enter__()
    second.__enter__()
    assert Plain().name() == "not plain"
    first.__exit__(None, None, None)
    assert Plain().name() == "not plain"
    second.__exit__(None, None, None)
    assert Plain.__dict__["name"] is before


def test_it_is_put_back_after_an_error() -> None:
    before = Plain.__dict__["name"]
    with pytest.raises(ZeroDivisionError), Patched("name", lambda plain: None).within(Plain):
        _ = 1 / 0
    assert Plain.__dict__["name"] is before
