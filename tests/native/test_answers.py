"""AnswerCheck, in Python and in C++."""

from __future__ import annotations

import gc
import weakref
from types import ModuleType

import pytest


def test_holds_while_every_function_answers_the_same(checks: ModuleType) -> None:
    modes: list[int] = []
    same = checks.AnswerCheck([(len, (modes,), 0), (modes.copy, (), modes.copy), (bool, (), False)])
    assert same() is False, "a list that equals is not the object"
    same = checks.AnswerCheck([(len, (modes,), 0), (bool, (), False), (max, (1, 2), 2)])
    assert same() is True
    modes.append(1)
    assert same() is False
    modes.clear()
    assert same() is True
    assert checks.AnswerCheck([])() is True


def test_what_raises_is_a_false(checks: ModuleType) -> None:
    asked: list[str] = []
    same = checks.AnswerCheck([(asked.append, ("first",), None), (len, (), 0), (asked.append, ("last",), None)])
    assert same() is False
    assert asked == ["first"], "nothing is asked after the first one that does not answer"


@pytest.mark.parametrize("question", [None, (len, ()), (len, [], 0), ("len", (), 0)])
def test_what_is_no_question(checks: ModuleType, question: object) -> None:
    with pytest.raises(TypeError, match="question 1: expected a tuple"):
        checks.AnswerCheck([(bool, (), False), question])


def test_takes_no_arguments(checks: ModuleType) -> None:
    with pytest.raises(TypeError):
        checks.AnswerCheck([])(1)


def test_the_collector_sees_through_it(checks: ModuleType) -> None:
    class Owner:
        check: object = None

        def answer(self) -> None:
            return None

    owner = Owner()
    owner.check = checks.AnswerCheck([(owner.answer, (), None)])
    gone = weakref.ref(owner)
    del owner
    gc.collect()
    assert gone() is None or checks.__name__.endswith("fallback")
