"""What a plan is taken to need, before it is tried, from what others took.

A guess that is too low costs one capture, which is thrown away; its size is known from then on. One that is too high
keeps a plan out that would have fitted, and nothing ever shows it. So a plan that is smaller than all others is taken
to need as much less as those differ among each other, and nothing where there is only one to go by.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable


class Needs:
    """The bytes that plans took, by their kind and their rows."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._taken: dict[Hashable, dict[int, int]] = {}

    def note(self, kind: Hashable, rows: int, num_bytes: int) -> None:
        """A plan for so many rows took this, whether it was kept or not."""
        self._taken.setdefault(kind, {})[rows] = num_bytes

    def guess(self, kind: Hashable, rows: int) -> int:
        """What a plan for so many rows will take: on the line through those beside it. As much as the largest of its
        kind where it is larger than all of them, and 0 where there is none."""
        taken = self._taken.get(kind, {})
        known = sorted(taken)
        at = bisect_left(known, rows)
        if at == len(known):
            return taken[known[-1]] if known else 0
        if known[at] == rows:
            return taken[rows]
        if len(known) == 1:
            return 0
        low = max(at - 1, 0)  # below all of them: on the line through the two smallest
        few, many = known[low], known[low + 1]
        slope = (taken[many] - taken[few]) / (many - few)
        return max(0, int(taken[few] + slope * (rows - few)))
