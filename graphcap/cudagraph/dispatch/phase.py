"""Whether captures are allowed now, and whether somebody is capturing a ladder on purpose."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from contextvars import ContextVar, Token
from dataclasses import dataclass

import torch

from graphcap.cudagraph.dispatch.revision import revise
from graphcap.errors import StepError


class Phase(enum.Enum):
    """What a call is made for."""

    TRAFFIC = enum.auto()  #: its result
    WARM_UP = enum.auto()  #: to learn what the capture that follows must know
    RECORD = enum.auto()  #: to be captured


class Keeper:
    """The state of a model as it was before it was called for the sake of a capture.

    Attributes:
        lent: tensors of a caller that calls are made with, and that may be written. They are kept like buffers.
        not_kept: bytes of state that was too large to keep.
    """

    def __init__(self, max_bytes: int, lent: Iterable[torch.Tensor] = (), must_keep: str = "") -> None:
        """Keep copies of up to ``max_bytes`` in all.

        Args:
            max_bytes: what copies may take.
            lent: see the class.
            must_keep: why no state may be written that is too large to keep; ``""`` where it may.
        """
        self.lent = {id(tensor) for tensor in lent}
        self.not_kept = 0
        self._left = max_bytes
        self._must_keep = must_keep
        self._kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._too_large: set[int] = set()

    def keep(self, tensors: Iterable[torch.Tensor]) -> None:
        """Copy what the calls that follow are going to write into.

        Raises:
            StepError: it is too large, and must be kept.
        """
        for tensor in tensors:
            if id(tensor) in self._kept or id(tensor) in self._too_large:
                continue
            nbytes = tensor.numel() * tensor.element_size()
            if nbytes > self._left:
                if self._must_keep:
                    raise StepError(f"{nbytes} bytes of state are too large to be put back, and {self._must_keep}")
                self.not_kept += nbytes
                self._too_large.add(id(tensor))
                continue
            self._left -= nbytes
            # In inference mode a copy would be an inference tensor.
            with torch.inference_mode(False), torch.no_grad():
                self._kept[id(tensor)] = tensor, tensor.detach().clone()

    def restore(self) -> None:
        """Put everything back."""
        with torch.no_grad():
            for tensor, copy in self._kept.values():
                tensor.copy_(copy)
        self._kept.clear()


@dataclass(frozen=True, slots=True)
class Purpose:
    """Why a call is made, who keeps the state that it writes into, and whether nobody reads what it leaves."""

    phase: Phase = Phase.TRAFFIC
    keeper: Keeper | None = None
    is_unread: bool = False


_purpose: ContextVar[Purpose] = ContextVar("graphcap_purpose", default=Purpose())  # noqa: B039 - frozen
current_purpose = _purpose.get


class in_phase:
    """Make the calls inside of the ``with`` block for a purpose.

    Args:
        phase: see :class:`Phase`.
        keeper: keeps the state that they write into.
        is_unread: nobody reads what they return and what they write: only what is recorded counts.
    """

    __slots__ = ("_purpose", "_token")

    def __init__(self, phase: Phase, keeper: Keeper | None = None, *, is_unread: bool = False) -> None:
        self._purpose = Purpose(phase, keeper, is_unread)

    def __enter__(self) -> None:
        self._token: Token[Purpose] = _purpose.set(self._purpose)

    def __exit__(self, *_: object) -> None:
        _purpose.reset(self._token)


class _Seal:
    allowed = True


def captures_allowed() -> bool:
    """Whether new graphs may be captured in this process."""
    return _Seal.allowed


class allow_capture:
    """Allow or forbid new captures, in the whole process.

    ``graphcap.allow_capture(False)`` seals it, for a server that has captured its ladder and wants no pause in traffic:
    what has a graph is replayed, and a call that would be captured runs live and is counted as such. A graph that goes
    because weights were replaced may still be captured again; that of a model in a process group only where single
    weights were. As a context manager it puts back what was before.

    Args:
        allowed: whether captures are allowed from now on.
    """

    def __init__(self, allowed: bool = True) -> None:
        self._before = _Seal.allowed
        _Seal.allowed = bool(allowed)
        revise()

    def __enter__(self) -> allow_capture:
        return self

    def __exit__(self, *_: object) -> None:
        _Seal.allowed = self._before
        revise()
