"""What in the counters of a region deserves a warning: pure functions, and a memory so that each is given once."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from typing import NamedTuple

from graphcap.cudagraph.counters.stats import RunnerStats
from graphcap.cudagraph.counters.traffic import Traffic, traffic_of

_log = logging.getLogger("graphcap.cudagraph")

_ENOUGH_CALLS = 100  #: calls before shares mean anything
_MANY_LIVE = 0.5  #: of the calls, those that are as intended left out
_MANY_UNCOVERED = 0.05  #: of the calls
_MUCH_PADDING = 0.3  #: of the tokens that replays compute
_MANY_RECAPTURES = 8

#: How the reasons of live calls begin that somebody asked for, or that every shape goes through.
_AS_INTENDED = ("warm-up", "cudagraph_mode=", "max_mode=", "dispatched to run")


class Alert(NamedTuple):
    """One thing that somebody should look at.

    Attributes:
        cause: a word for it, the same on every call: ``"live"``, ``"first"``, ``"uncovered"``, ``"padding"``,
            ``"recaptures"``.
        message: what was counted and what to do.
    """

    cause: str
    message: str


def alerts(stats: RunnerStats) -> list[Alert]:
    """What the counters of one runner give reason to say now."""
    traffic = traffic_of([stats])
    return [*_live(stats), *_first(stats), *_uncovered(traffic), *_padding(traffic), *_recaptures(stats)]


def _live(stats: RunnerStats) -> Iterator[Alert]:
    reasons = [
        (calls, reason) for reason, calls in list(stats.live_calls.items()) if not reason.startswith(_AS_INTENDED)
    ]
    live = sum(calls for calls, _ in reasons)
    total = live + stats.replays
    if total >= _ENOUGH_CALLS and live > _MANY_LIVE * total:
        calls, reason = max(reasons)
        yield Alert(
            "live",
            f"{live} of {total} calls ran without a graph, {calls} of them for this reason: {reason}. "
            "graphcap.explain() has all reasons",
        )


def _first(stats: RunnerStats) -> Iterator[Alert]:
    total = stats.live_calls.total() + stats.replays
    first = sum(calls for reason, calls in list(stats.live_calls.items()) if reason.startswith("warm-up"))
    if total >= _ENOUGH_CALLS and first > _MANY_LIVE * total:
        yield Alert(
            "first",
            f"{first} of {total} calls were the first with their sizes and numbers, and ran without a graph. A number "
            "that is another one in every call belongs into a tensor, a size into dynamic_arg_dims and capture_sizes; "
            "graphcap.explain() says what the graph key holds",
        )


def _uncovered(traffic: Traffic) -> Iterator[Alert]:
    uncovered = traffic.uncovered()
    calls, total = sum(uncovered.values()), sum(traffic.histogram().values())
    if total >= _ENOUGH_CALLS and calls > _MANY_UNCOVERED * total:
        size, times = next(iter(uncovered.items()))
        shown = ", ".join(f"{name}={n}" for name, n in zip(traffic.names, size, strict=False)) or str(size)
        yield Alert(
            "uncovered",
            f"{calls} of {total} calls had one of {len(uncovered)} sizes that no rung of the ladder serves, most often "
            f"{shown} ({times} calls). Add to capture_sizes what graphcap.suggest_ladder(explain(), budget) proposes",
        )


def _padding(traffic: Traffic) -> Iterator[Alert]:
    replays = sum(traffic.hits().values())
    if replays >= _ENOUGH_CALLS and traffic.padding_waste > _MUCH_PADDING:
        yield Alert(
            "padding",
            f"{traffic.padding_waste:.0%} of what {replays} replays computed was padding. Choose capture_sizes nearer "
            "to the sizes in use (graphcap.suggest_ladder(explain(), budget)) or lower max_padding_ratio",
        )


def _recaptures(stats: RunnerStats) -> Iterator[Alert]:
    if stats.recaptures > _MANY_RECAPTURES:
        moved = stats.moves.most_common(1)
        which = f", most often that of {moved[0][0]} ({moved[0][1]} times)" if moved else ""
        yield Alert(
            "recaptures",
            f"plans were captured again {stats.recaptures} times because a static address had moved{which}. Keep such "
            "tensors in place (copy_ into them) or take them out of static_args",
        )


_given: set[tuple[str, str]] = set()
_given_lock = threading.Lock()


def warn_once(region: str, stats: RunnerStats) -> None:
    """Log a warning for each alert of a region whose cause was not yet warned of in this process.

    Not for the path of a replay: meant for calls that are slow already, now and then.
    """
    for alert in alerts(stats):
        with _given_lock:
            new = (region, alert.cause) not in _given
            _given.add((region, alert.cause))
        if new:
            _log.warning("%s: %s", region, alert.message)


def forget_warnings() -> None:
    """Be ready to give every warning again."""
    with _given_lock:
        _given.clear()
