"""Which calls are compared with the function itself: the first replays of each plan, and one call in many.

A padded call is compared at its first sight, whatever serves it: a function may do something else at the padded size.
"""

from __future__ import annotations

import enum
from collections.abc import Hashable

from graphcap.cudagraph import PlanStats

CHECKED_REPLAYS = 2  #: of each plan at its own size, compared with the function itself; one at each other size
CHECK_EVERY = 256  #: calls; then the function itself runs once more
_MAX_KINDS = 65536  #: kinds of calls that are remembered


class When(enum.Enum):
    """Whether a call is compared."""

    NEVER = enum.auto()
    FIRST = enum.auto()  #: nothing like it was compared yet
    AGAIN = enum.auto()  #: it agreed before, and what Python does may have changed since


class Due:
    """Counts the calls of one entry.

    Attributes:
        num_unchecked: calls since the latest comparison.
    """

    def __init__(self) -> None:
        self.num_unchecked = 0
        self._num_calls = 0
        self._left: dict[Hashable, tuple[object, int]] = {}  # by kind of call: what serves it, comparisons to come

    def when(self, kind: Hashable, outlook: PlanStats | str, at: Hashable, is_padded: bool) -> When:
        """Count a call; whether it is compared.

        Args:
            kind: of the call.
            outlook: the plan that serves it, why none does, or ``""`` where it leads to one.
            at: its sizes.
            is_padded: whether it may be padded.
        """
        self._num_calls += 1
        is_plan = isinstance(outlook, PlanStats)
        if is_plan or (is_padded and not outlook):
            known, left = self._left.get(kind, (None, 0))
            if known is not outlook:
                left = CHECKED_REPLAYS if isinstance(outlook, PlanStats) and outlook.key == at else 1
            if len(self._left) >= _MAX_KINDS:
                self._left.clear()
            self._left[kind] = outlook, max(0, left - 1)
            if left:
                return When.FIRST
        self.num_unchecked += 1
        return When.AGAIN if is_plan and self._num_calls % CHECK_EVERY == 0 else When.NEVER

    def was_checked(self, kind: Hashable, ran_live: bool) -> int:
        """A call was compared, or ran live in spite of it. Returns how many before it were not."""
        if ran_live:
            self._left.pop(kind, None)
        unchecked, self.num_unchecked = self.num_unchecked, 0
        return unchecked
