"""Whether captures are allowed now, and whether somebody is capturing a ladder on purpose."""

from __future__ import annotations

import enum
from contextvars import ContextVar, Token


class Phase(enum.Enum):
    """What a call is made for."""

    TRAFFIC = enum.auto()  #: its result
    WARM_UP = enum.auto()  #: to learn what the capture that follows must know
    RECORD = enum.auto()  #: to be captured


_phase: ContextVar[Phase] = ContextVar("graphcap_phase", default=Phase.TRAFFIC)
current_phase = _phase.get


class in_phase:
    """Make the calls inside of the ``with`` block for a purpose."""

    __slots__ = ("_phase", "_token")

    def __init__(self, phase: Phase) -> None:
        self._phase = phase

    def __enter__(self) -> None:
        self._token: Token[Phase] = _phase.set(self._phase)

    def __exit__(self, *_: object) -> None:
        _phase.reset(self._token)


class _Seal:
    allowed = True


def captures_allowed() -> bool:
    """Whether new graphs may be captured in this process."""
    return _Seal.allowed


class allow_capture:
    """Allow or forbid new captures, in the whole process.

    ``graphcap.allow_capture(False)`` seals it, for a server that has captured its ladder and wants no pause in traffic:
    what has a graph is replayed, and a call that would be captured runs live and is counted as such. As a context
    manager it puts back what was before.

    Args:
        allowed: whether captures are allowed from now on.
    """

    def __init__(self, allowed: bool = True) -> None:
        self._before = _Seal.allowed
        _Seal.allowed = bool(allowed)

    def __enter__(self) -> allow_capture:
        return self

    def __exit__(self, *_: object) -> None:
        _Seal.allowed = self._before
