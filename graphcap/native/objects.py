"""In Python: whether dicts hold the objects that they held, and functions answer what they answered."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import repeat
from typing import Any

#: What is expected of a dict, or of an argument: a key and the object under it.
Entry = tuple[dict[Any, Any] | int, Hashable, object]
#: A dict, or an argument with the dict that it is now.
Sized = dict[Any, Any] | tuple[int, dict[Any, Any]]
#: A function, what it is called with, and the very object that it has to return.
Question = tuple[Callable[..., object], tuple[object, ...], object]

_MISSING = object()


class IdentityCheck:
    """Whether dicts still hold the very objects that they held.

    It is true exactly when, for every entry ``(dict, key, object)``, the dict has the key and ``dict[key] is object``,
    and every dict in ``sized`` has as many keys as when the check was made. An object replaced by an equal one, a
    deleted key and a key whose ``__eq__`` raises are a false.

    Instead of a dict an entry may have a number, and ``sized`` a pair ``(number, dict)``: then it is about the argument
    of that number, which may be another dict on every call. A call takes as many dicts as there are numbers.

    The dicts and keys are kept alive (not so arguments), and the objects only where they do not support weak references
    (``None``, numbers, strings, dicts): an obsolete parameter or submodule is not kept alive, and once one of them is
    dead the check is false for ever. A dict keeps alive what it holds, so a check of ``module._parameters`` keeps the
    parameters of a dead module: who makes one calls :meth:`clear` when the module dies, or is itself owned by the
    module (the garbage collector sees through a check). A check that has been cleared is false.

    A module that gets a new dict (``module._parameters = {...}``) is noticed only when ``(module.__dict__,
    "_parameters", module._parameters)`` is among the entries.

    Raises:
        TypeError: for an entry that is no such tuple, a key that cannot be hashed, or something in ``sized`` that is no
            dict; when called, for anything but so many dicts.
    """

    __slots__ = ("_dead", "_dicts", "_ids", "_keys", "_num_arguments", "_sized", "_sizes", "_strong", "_weak")

    def __init__(self, entries: Iterable[Entry], sized: Iterable[Sized] = ()) -> None:
        self._dicts: list[dict[Any, Any] | int] = []
        self._keys: list[Hashable] = []
        #: As long as ``_dead`` is empty these objects are alive, so that no other object can have their ids.
        self._ids: list[int] = []
        self._weak: list[weakref.ref[Any]] = []
        self._strong: list[object] = []
        self._dead: list[object] = []
        for number, entry in enumerate(entries):
            self._add(*_checked(number, entry))
        pairs = [_place_and_dict(number, each) for number, each in enumerate(sized)]
        self._sized: list[dict[Any, Any] | int] = [place for place, _ in pairs]
        self._sizes = [len(holder) for _, holder in pairs]
        numbers = [place for place in (*self._dicts, *self._sized) if isinstance(place, int)]
        self._num_arguments = max(numbers, default=-1) + 1

    def _add(self, holder: dict[Any, Any] | int, key: Hashable, expected: object) -> None:
        hash(key)
        self._dicts.append(holder)
        self._keys.append(sys.intern(key) if type(key) is str else key)
        self._ids.append(id(expected))
        try:
            self._weak.append(weakref.ref(expected, self._dead.append))
        except TypeError:
            self._strong.append(expected)

    def __call__(self, *arguments: dict[Any, Any]) -> bool:
        if not all(isinstance(each, dict) for each in arguments):
            raise TypeError(f"IdentityCheck takes {self._num_arguments} dicts")
        if self._dead:
            return False
        if len(arguments) != self._num_arguments:
            raise TypeError(f"IdentityCheck takes {self._num_arguments} dicts")
        dicts, sized = _filled_in(self._dicts, arguments), _filled_in(self._sized, arguments)
        try:
            found = list(map(id, map(dict.get, dicts, self._keys, repeat(_MISSING))))
        except Exception:
            return False
        return found == self._ids and not self._dead and list(map(len, sized)) == self._sizes

    def clear(self) -> None:
        """Let go of everything; the check is false from here on."""
        self._dead.append(None)
        self._dicts, self._keys, self._ids, self._weak, self._strong = [], [], [], [], []
        self._sized, self._sizes = [], []


class AnswerCheck:
    """Whether functions still answer what they answered.

    It is true exactly when every ``function(*arguments)`` returns the object ``answer``. They are called in their order
    up to the first one that does not; one that raises is a false.

    Raises:
        TypeError: for what is no tuple of a function, a tuple of arguments and an answer; when called with anything.
    """

    __slots__ = ("_questions",)

    def __init__(self, questions: Iterable[Question]) -> None:
        self._questions = tuple(_question(number, each) for number, each in enumerate(questions))

    def __call__(self) -> bool:
        try:
            for function, arguments, answer in self._questions:
                if function(*arguments) is not answer:
                    return False
        except Exception:
            return False
        return True


def _question(number: int, given: Any) -> Question:
    if isinstance(given, tuple) and len(given) == 3 and callable(given[0]) and isinstance(given[1], tuple):
        return given
    raise TypeError(f"question {number}: expected a tuple (function, arguments, answer), got {given!r}")


def _filled_in(places: list[dict[Any, Any] | int], arguments: Sequence[dict[Any, Any]]) -> list[dict[Any, Any]]:
    return [arguments[place] if isinstance(place, int) else place for place in places]


def _checked(number: int, entry: Any) -> Entry:
    if isinstance(entry, tuple) and len(entry) == 3 and (isinstance(entry[0], dict) or _is_argument(entry[0])):
        return entry
    raise TypeError(f"entry {number}: expected a tuple (dict, key, object), got {entry!r}")


def _place_and_dict(number: int, sized: Any) -> tuple[dict[Any, Any] | int, dict[Any, Any]]:
    place, holder = sized if isinstance(sized, tuple) and len(sized) == 2 else (sized, sized)
    if isinstance(holder, dict) and (place is holder or _is_argument(place)):
        return place, holder
    raise TypeError(f"sized {number}: expected a dict, got {sized!r}")


def _is_argument(place: object) -> bool:
    return type(place) is int and place >= 0
