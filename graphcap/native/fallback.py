"""The checks in Python: the contract of both implementations, and what runs where there is no extension.

Microseconds per call that holds, best of seven runs on one core of a two-core AMD EPYC virtual machine, Python 3.11,
everything in the processor's caches: 227 parameters, and 430 dict entries of the module tree that they belong to.

=====================================================  ==========  ==========
..                                                     torch 2.11  torch 2.13
=====================================================  ==========  ==========
AddressCheck, extension                                       1.7         1.7
AddressCheck, Python                                           21          23
torch's own (``_tensors_data_ptrs_at_indices_equal``)          14           -
IdentityCheck, extension                                      3.5         3.6
IdentityCheck, Python                                          26          26
=====================================================  ==========  ==========
"""

from __future__ import annotations

import operator
import sys
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import repeat
from typing import Any

import torch

#: What is expected of a dict, or of an argument: a key and the object under it.
Entry = tuple[dict[Any, Any] | int, Hashable, object]
#: A function, what it is called with, and the very object that it has to return.
Question = tuple[Callable[..., object], tuple[object, ...], object]
#: A dict, or an argument with the dict that it is now.
Sized = dict[Any, Any] | tuple[int, dict[Any, Any]]

_MISSING = object()


class AddressCheck:
    """Whether tensors still begin where they began.

    Called with one tuple or list, it is true exactly when every ``indices[k]`` is the index of a tensor in it whose
    ``data_ptr()`` equals ``addresses[k]``; that of an empty, a meta and a fake tensor is 0. What is no tensor and what
    refuses to tell an address (a sparse tensor, one inside of functorch's transforms) is a false, never an exception.
    So is a copy-on-write tensor that shares its memory: it moves when it is written, while a graph would write to what
    it shares. (The extension says false for every copy-on-write tensor and leaves it as it is; this class, like
    ``data_ptr()``, makes its copy.)

    Refers to no tensor.

    Raises:
        ValueError: when the two sequences differ in length, or for a negative index.
        TypeError: for what is no integer; when called, for what is no tuple or list.
    """

    __slots__ = ("_addresses", "_indices")

    def __init__(self, indices: Sequence[int], addresses: Sequence[int]) -> None:
        self._indices = _indices(indices)
        self._addresses = [operator.index(address) for address in addresses]
        if len(self._indices) != len(self._addresses):
            raise ValueError(f"{len(self._indices)} indices, but {len(self._addresses)} addresses")

    def __call__(self, args: tuple[Any, ...] | list[Any], /) -> bool:
        if not isinstance(args, (tuple, list)):
            raise TypeError("AddressCheck takes one argument, a tuple or a list")
        try:
            return list(map(torch.Tensor.data_ptr, map(args.__getitem__, self._indices))) == self._addresses
        except Exception:
            return False


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


class ApartCheck:
    """Whether tensors lie in other storages than some.

    Called with one tuple or list, it is true exactly when every ``indices[k]`` is the index of a tensor in it whose
    storage begins at none of the ``addresses``. What is no tensor or has no storage is a false.

    Raises:
        ValueError: for a negative index.
        TypeError: for what is no integer; when called, for what is no tuple or list.
    """

    __slots__ = ("_addresses", "_indices")

    def __init__(self, indices: Sequence[int], addresses: Sequence[int]) -> None:
        self._indices = _indices(indices)
        self._addresses = frozenset(operator.index(address) for address in addresses)

    def __call__(self, args: tuple[Any, ...] | list[Any], /) -> bool:
        if not isinstance(args, (tuple, list)):
            raise TypeError("ApartCheck takes one argument, a tuple or a list")
        try:
            return self._addresses.isdisjoint([args[index].untyped_storage().data_ptr() for index in self._indices])
        except Exception:
            return False


class GroupedCopy:
    """Copies arguments into tensors of one dtype, which nobody else knows: autograd does not see it.

    Called with one tuple or list, it copies what has the index ``indices[k]`` in it into ``targets[k]``, which has the
    same size. There is at least one.

    Raises:
        ValueError: when the two sequences differ in length, or for a negative index.
        TypeError: for targets that are no tensors; when called, for what is no tuple or list, or has no tensor there.
        RuntimeError: when called, from torch: sizes that do not fit.
    """

    __slots__ = ("_indices", "_targets")

    def __init__(self, targets: Sequence[torch.Tensor], indices: Sequence[int]) -> None:
        self._targets, self._indices = list(targets), _indices(indices)
        for number, target in enumerate(self._targets):
            if not isinstance(target, torch.Tensor):
                raise TypeError(f"target {number}: expected a tensor, got {target!r}")
        if len(self._targets) != len(self._indices):
            raise ValueError(f"{len(self._targets)} targets, but {len(self._indices)} indices")

    def __call__(self, args: tuple[Any, ...] | list[Any], /) -> None:
        if not isinstance(args, (tuple, list)):
            raise TypeError("GroupedCopy takes one argument, a tuple or a list")
        with torch.no_grad():
            torch._foreach_copy_(self._targets, [_tensor(args, index) for index in self._indices])


def _tensor(args: Sequence[Any], index: int) -> torch.Tensor:
    found = args[index] if index < len(args) else None
    if isinstance(found, torch.Tensor):
        return found
    raise TypeError(f"argument {index}: expected a tensor, got {found!r}")


def _question(number: int, given: Any) -> Question:
    if isinstance(given, tuple) and len(given) == 3 and callable(given[0]) and isinstance(given[1], tuple):
        return given
    raise TypeError(f"question {number}: expected a tuple (function, arguments, answer), got {given!r}")


def _indices(given: Sequence[int]) -> list[int]:
    indices = [operator.index(index) for index in given]
    if indices and min(indices) < 0:
        raise ValueError(f"an index must not be negative, got {min(indices)}")
    return indices


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
