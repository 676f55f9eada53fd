"""Put something around the graph launches and the live calls of one replay: a check, a clock, a name in a trace.

A replay that needs nothing of the kind is left as it was generated and pays nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import FunctionType
from typing import Any

from graphcap.cudagraph.recording.recorded import Recorded

#: Takes the number of a segment (or of a live step) and what the replay calls for it; returns what to call instead.
Wrapper = Callable[[int, Callable[..., Any]], Callable[..., Any]]

#: Under this name a replay that copies are made of (one for each size of a padded plan) has a weak set of them.
COPIES = "copies"


def put_around(
    replay: Callable[..., Any], recorded: Recorded, *, segment: Wrapper | None = None, live: Wrapper | None = None
) -> Callable[[], None]:
    """Wrap what a generated replay calls.

    The replay is one function of its own globals (see ``replay.py``), where ``g0`` is the launch of
    segment 0 and ``live3`` live step 3. A copy of the function that is made later calls the wrapped ones, too, until
    the wrapping is taken off.

    Args:
        replay: the function that :func:`graphcap.cudagraph.replaying.replay.generate` returned.
        recorded: what it replays.
        segment: wraps ``launch()``.
        live: wraps ``call(*values)``.

    Returns:
        A function that takes the wrapping off again.
    """
    assert isinstance(replay, FunctionType)
    names = replay.__globals__
    plain: dict[str, Any] = {}
    for entry in recorded.timeline:
        name, number, wrapper = (f"g{~entry}", ~entry, segment) if entry < 0 else (f"live{entry}", entry, live)
        if wrapper is not None:
            plain[name] = names[name]
            names[name] = wrapper(number, names[name])

    found = weakref.ref(replay)  # what wraps must not hold the replay: a dropped plan must not wait for the collector

    def take_off() -> None:
        function = found()
        if function is not None:
            for each in (function, *function.__globals__.get(COPIES, ())):
                each.__globals__.update(plain)

    return take_off
