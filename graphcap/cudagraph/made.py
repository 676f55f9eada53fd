"""What became of a call on the way to a plan, and the usual reasons why it ran without a graph."""

from __future__ import annotations

from typing import Any, NamedTuple

WARM_UP = "warm-up"  #: why a call ran live that a capture may follow
ELSEWHERE = "inside another capture or replay"  #: why a plan cannot run, where the device is in use further up


class Made(NamedTuple):
    """A call on the way to a plan.

    Attributes:
        outputs: what it returns.
        reason: why it ran without a graph; ``""`` for the one that was captured.
        misjudged: whether its values share memory in another way than those of another size, which was taken for
            granted: what a call of this size shows must be seen first.
        was_cold: whether a step failed that may have lacked a call of this size before.
    """

    outputs: tuple[Any, ...]
    reason: str = ""
    misjudged: bool = False
    was_cold: bool = False
