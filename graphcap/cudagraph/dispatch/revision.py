"""Whether what was decided about calls that nobody has made yet still holds.

A decision looks at the plans that there are, at what was refused, at the room on the device, at the seal of
``allow_capture`` and at which runner is whose. All of these change rarely, and whoever changes one says so here. So a
decision that was made after a look at :func:`revision` holds for as long as that still returns the same object.
"""

from __future__ import annotations


class _Revision:
    # An object of its own each time, not a number: two threads that count at once could come back to an old number.
    now: object = object()


def revision() -> object:
    """The present revision. Keep it and compare with ``is``; take it before looking at what a decision depends on."""
    return _Revision.now


def revise() -> None:
    """Something has changed that decisions depend on."""
    _Revision.now = object()
