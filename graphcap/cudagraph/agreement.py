"""What the ranks of a process group decide together, so that all of them run the same collectives in the same order.

A warm-up, a live run, a capture and a replay run every collective of a call once, so ranks may not mix them up freely
but never lose step through them; a proof runs the call several times. And NCCL wants an operation captured by all ranks
or by none. So the ranks tell each other what they know before any of them acts, and each draws the same conclusion.

Nothing is said on a replay. What a rank remembers of a region (plans, refusals, demoted steps, proofs) changes only by
what was agreed, so the same call finds the same state on every rank: either all of them replay, or all of them ask.
"""

from __future__ import annotations

import threading
import weakref
import zlib
from typing import Any, Protocol, TypeVar

import torch

from graphcap.errors import RankError

T = TypeVar("T")

_NOTHING: Any = object()


class Agreement(Protocol):
    """Those who decide together.

    Attributes:
        is_group: whether there is anybody to ask.
    """

    is_group: bool

    def gather(self, question: str, mine: T, usual: T = _NOTHING) -> list[T]:
        """What everybody says to a question, in the order of their ranks. Waits for all of them.

        Args:
            question: the same on every rank: ``"forward_0: may it be captured, PIECEWISE (8,)"``.
            mine: this rank's answer. It is pickled.
            usual: where all say this, the exchange is one small all-reduce.

        Raises:
            RankError: another rank asks something else, or does not ask at all.
        """

    def reason(self, question: str, mine: str) -> str:
        """The first reason that anybody has, ``""`` where nobody has one. Another rank's begins with its number."""


class _Alone:
    """One process."""

    is_group = False

    def gather(self, question: str, mine: T, usual: T = _NOTHING) -> list[T]:
        return [mine]

    def reason(self, question: str, mine: str) -> str:
        return mine


#: What a process decides that is in no group.
alone: Agreement = _Alone()


class InGroup:
    """The ranks of one process group.

    They talk on the CPU: through the group itself where it can, otherwise through a gloo group of the same ranks that
    is made at the first question. A rank that does not come is waited for as long as that group waits.
    """

    is_group = True

    def __init__(self, process_group: Any) -> None:
        self._given = weakref.ref(process_group)
        self._made: Any = None  # the gloo group, where one is needed
        self._lock = threading.Lock()

    def gather(self, question: str, mine: T, usual: T = _NOTHING) -> list[T]:
        """See :class:`Agreement`."""
        try:
            with self._lock:
                said = _exchange(self._channel_of(self._given()), question, mine, mine == usual)
        except Exception as error:
            raise RankError(
                f"no answer from the other ranks to {question!r} ({type(error).__name__}: {error}). Every rank of a "
                "process group must make the same calls in the same order, graphcap.release() included, and inputs "
                "that are used in place must move on all ranks or on none"
            ) from error
        if any(other != question for other, _ in said):
            asked = "; ".join(f"rank {rank}: {other}" for rank, (other, _) in enumerate(said))
            raise RankError(
                f"the ranks are out of step, they ask about different things ({asked}). Every rank of a process group "
                "must make the same calls in the same order, at the same sizes or with one step(dispatch=...)"
            )
        return [answer for _, answer in said]

    def reason(self, question: str, mine: str) -> str:
        """See :class:`Agreement`."""
        reasons = self.gather(question, mine, usual="")
        found = next((rank for rank, reason in enumerate(reasons) if reason), None)
        if mine or found is None:
            return mine
        return f"rank {found}: {reasons[found]}"

    def _channel_of(self, process_group: Any) -> Any:
        """A group of the same ranks that takes tensors on the CPU."""
        import torch.distributed as dist

        if process_group is None:
            raise RuntimeError("the process group is gone")
        backends = dist.get_backend_config(process_group).split(",")
        if any(each.startswith("cpu:") for each in backends) or not dist.is_gloo_available():
            return process_group
        if self._made is None:
            ranks = dist.get_process_group_ranks(process_group)
            # Only its members take part: others may know nothing of this group.
            self._made = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        return self._made


def _exchange(channel: Any, question: str, mine: Any, is_usual: bool) -> list[tuple[str, Any]]:
    """Per rank what it asks and what it says."""
    import torch.distributed as dist

    number = zlib.crc32(question.encode())
    with torch.inference_mode(False):
        header = torch.tensor([not is_usual, number, -number], dtype=torch.int64, device="cpu")
        dist.all_reduce(header, dist.ReduceOp.MAX, group=channel)
    is_unusual, largest, smallest = header.tolist()
    num_ranks = dist.get_world_size(channel)
    if not is_unusual and largest == -smallest:  # all ask the same and have nothing to tell
        return [(question, mine)] * num_ranks
    said: list[Any] = [None] * num_ranks
    dist.all_gather_object(said, (question, mine), group=channel)
    return said


_groups: weakref.WeakKeyDictionary[Any, InGroup] = weakref.WeakKeyDictionary()
_groups_lock = threading.Lock()


def agreement_of(process_group: Any) -> Agreement:
    """How a process decides that is in this group; ``None`` is no group. One object for each group."""
    if process_group is None:
        return alone
    with _groups_lock:
        return _groups.setdefault(process_group, InGroup(process_group))
