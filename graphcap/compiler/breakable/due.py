"""Which calls are compared with the function itself: the first replays of each plan, and one call in many."""

from __future__ import annotations

from collections.abc import Hashable

from graphcap.cudagraph import PlanStats

CHECKED_REPLAYS = 2  #: of each plan at its own size, compared with the function itself; one at each other size
CHECK_EVERY = 256  #: calls; then the function itself runs once more
_MAX_KINDS = 65536  #: kinds of calls that are remembered


class Due:
    """Counts the calls of one entry.

    Attributes:
        num_unchecked: calls since the latest comparison.
    """

    def __init__(self) -> None:
        self.num_unchecked = 0
        self._num_calls = 0
        self._left: dict[Hashable, tuple[PlanStats, int]] = {}  # by kind of call: its plan, and comparisons to come

    def is_due(self, kind: Hashable, plan: PlanStats | None, at_own_size: bool) -> bool:
        """Count a call; whether it is compared.

        Args:
            kind: of the call.
            plan: that serves it, ``None`` where none does.
            at_own_size: whether it has the size that the plan was captured at.
        """
        self._num_calls += 1
        if plan is None:
            self.num_unchecked += 1
            return False
        known, left = self._left.get(kind, (None, 0))
        if known is not plan:
            left = CHECKED_REPLAYS if at_own_size else 1
        if len(self._left) >= _MAX_KINDS:
            self._left.clear()
        self._left[kind] = plan, max(0, left - 1)
        if left:
            return True
        self.num_unchecked += 1
        return self._num_calls % CHECK_EVERY == 0

    def was_checked(self) -> int:
        """A call was compared. Returns how many before it were not."""
        unchecked, self.num_unchecked = self.num_unchecked, 0
        return unchecked
