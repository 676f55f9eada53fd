"""What a value of each kind of setting may look like, in code and as the text of an environment variable.

A :class:`Kind` turns what the user wrote into the one form that :class:`graphcap.Config` holds (lists become tuples,
``"full"`` becomes ``CUDAGraphMode.FULL``), or raises :class:`BadValue` saying what it wanted.
"""

from __future__ import annotations

import enum
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from graphcap.errors import did_you_mean

_TRUE = ("1", "true", "yes", "on")
_FALSE = ("0", "false", "no", "off")
_OPERATOR_NAME = re.compile(r"\w+::(\*|\w+(\.\w+)?)|\w+(\.\w+)+")


#: The most buffers of a ring: they are made when a shape is captured.
MAX_RING = 1024


class BadValue(Exception):
    """A value that a setting cannot take; the text says what it can. Config turns it into a ConfigError."""


@dataclass(frozen=True, slots=True)
class Kind:
    """How one kind of setting is read.

    Attributes:
        accept: takes a Python value, returns its normal form, raises :class:`BadValue`.
        read: takes the text of an environment variable, returns a value for ``accept``; ``None`` where a kind (a
            function, a mapping) has no form as text.
    """

    accept: Callable[[Any], Any]
    read: Callable[[str], Any] | None


def _accept_bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise BadValue(f"expected True or False, got {value!r}")
    return value


def _read_bool(text: str) -> bool:
    folded = text.casefold()
    if folded in _TRUE:
        return True
    if folded in _FALSE:
        return False
    raise BadValue(f"expected one of {', '.join(_TRUE + _FALSE)}, got {text!r}")


def _accept_int(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadValue(f"expected an integer, got {value!r}")
    return value


def _read_int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise BadValue(f"expected an integer, got {text!r}") from None


def _accept_str(value: Any) -> str:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str) or not value:
        raise BadValue(f"expected a string that is not empty, got {value!r}")
    return value


def _accept_operator(value: Any) -> str:
    name = _accept_str(value)
    if not _OPERATOR_NAME.fullmatch(name):
        raise BadValue(f"expected 'ns::op', 'ns::op.overload', 'ns::*' or 'package.module.function', got {name!r}")
    return name


def _accept_callable(value: Any) -> Callable[..., Any]:
    if not callable(value):
        raise BadValue(f"expected a function, got {value!r}")
    return value  # type: ignore[no-any-return]


def _accept_mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise BadValue(f"expected a mapping with string keys, got {value!r}")
    return MappingProxyType(dict(value))


def _accept_fills(value: Any) -> Mapping[str, Any]:
    for name, fill in _accept_mapping(value).items():
        if not isinstance(fill, (bool, int, float)) and not callable(fill) and fill != "edge":
            raise BadValue(f"expected a number, 'edge' or a function for {name!r}, got {fill!r}")
    return _accept_mapping(value)


def _each(accept: Callable[[Any], Any], value: Any) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, (list, tuple, set, frozenset, range)):
        raise BadValue(f"expected a list or tuple, got {value!r}")
    return tuple(accept(item) for item in value)


def _split(text: str) -> list[str]:
    return [] if text.casefold() == "none" else [part.strip() for part in text.split(",") if part.strip()]


def _accept_ladders(value: Any) -> tuple[int, ...] | Mapping[str, tuple[int, ...]]:
    if isinstance(value, Mapping):
        return MappingProxyType({_accept_str(name): SIZES.accept(sizes) for name, sizes in value.items()})
    return SIZES.accept(value)  # type: ignore[no-any-return]


def _accept_ratio(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise BadValue(f"expected a number from 0 to below 1, got {value!r}")
    return float(value)


def _read_ratio(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise BadValue(f"expected a number from 0 to below 1, got {text!r}") from None


def _accept_outputs(value: Any) -> str:
    if isinstance(value, str) and (ring := re.fullmatch(r"ring:([1-9]\d*)", value, re.ASCII)):
        if len(ring[1]) > len(str(MAX_RING)) or int(ring[1]) > MAX_RING:
            raise BadValue(f"'ring:N' keeps N copies of every output, N is at most {MAX_RING}, got {value!r}")
        return value
    if value in ("clone", "static"):
        return str(value)
    raise BadValue(f"expected 'clone', 'static' or 'ring:N', got {value!r}")


def _accept_count_or_bool(value: Any) -> bool | int:
    return value if isinstance(value, bool) else int(at_least(0).accept(value))


def _read_count_or_bool(text: str) -> bool | int:
    if re.fullmatch(r"[+-]?\d+", text) and text not in ("0", "1"):
        return _read_int(text)
    try:
        return _read_bool(text)
    except BadValue:
        raise BadValue(f"expected a count or one of {', '.join(_TRUE + _FALSE)}, got {text!r}") from None


def _accept_process_group(value: Any) -> Any:
    distributed = sys.modules.get("torch.distributed")  # who has a group has imported it
    if distributed is None or not distributed.is_available() or not isinstance(value, distributed.ProcessGroup):
        raise BadValue(f"expected a torch.distributed.ProcessGroup or None, got {value!r}")
    return value


def optional(kind: Kind) -> Kind:
    """The same kind, or ``None`` (as text: ``none``)."""
    read = kind.read
    return Kind(
        accept=lambda value: None if value is None else kind.accept(value),
        read=None if read is None else lambda text: None if text.casefold() == "none" else read(text),
    )


def at_least(least: int) -> Kind:
    """An integer that is not less than ``least``."""

    def accept(value: Any) -> int:
        number = _accept_int(value)
        if number < least:
            raise BadValue(f"expected at least {least}, got {number}")
        return number

    return Kind(accept, _read_int)


def one_of(*choices: str) -> Kind:
    """One of a few words."""

    def accept(value: Any) -> str:
        if not isinstance(value, str) or value not in choices:
            raise BadValue(f"expected one of {', '.join(choices)}, got {value!r}")
        return value

    return Kind(accept, read=str)


def member_of(choices: type[enum.Enum]) -> Kind:
    """A member of an enum, or its name in any case."""

    def accept(value: Any) -> enum.Enum:
        if isinstance(value, choices):
            return value
        names = choices.__members__
        if isinstance(value, str) and value.upper() in names:
            return names[value.upper()]
        hint = f"; {did_you_mean(value, names)}" if isinstance(value, str) else ""
        raise BadValue(f"expected one of {', '.join(names)}, got {value!r}{hint}")

    return Kind(accept, read=str)


BOOL = Kind(_accept_bool, _read_bool)
STR = Kind(_accept_str, str)
NAMES = Kind(lambda value: _each(_accept_str, value), _split)
OPERATORS = Kind(lambda value: _each(_accept_operator, value), _split)
SIZES = Kind(  # in ascending order without repeats: two spellings of one set of sizes are one configuration
    lambda value: tuple(sorted(set(_each(at_least(1).accept, value)))),
    lambda text: [_read_int(part) for part in _split(text)],
)
#: One ladder of sizes, or one for each named dim.
LADDERS = Kind(_accept_ladders, SIZES.read)
RATIO = Kind(_accept_ratio, _read_ratio)
OUTPUTS = Kind(_accept_outputs, str)
COUNT_OR_BOOL = Kind(_accept_count_or_bool, _read_count_or_bool)
PROCESS_GROUP = Kind(_accept_process_group, None)
FUNCTIONS = Kind(lambda value: _each(_accept_callable, value), None)
MAPPING = Kind(_accept_mapping, None)
#: What padded rows of arguments hold.
FILLS = Kind(_accept_fills, None)
