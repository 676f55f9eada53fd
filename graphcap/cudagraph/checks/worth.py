"""Which segments are too small to be worth a graph: measured once for each family of plans, at its first capture.

A family is a mode and a kind of batch. What a launch costs the host is the same at every size, so one verdict serves
all rungs; the ladder begins with the largest, where the GPU has most to do.

A segment that is not worth a graph runs live, by choice, in every later plan of its family. Its steps lay between live
steps before, mostly attention, and now are live steps among them: no neighbour changes, and two segments never become
one through it. Results that captured steps read are bridged from then on, which the live time includes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

import torch

from graphcap.cudagraph.checks.scales import Scales, Weighed
from graphcap.cudagraph.counters.cost import worth_a_graph
from graphcap.cudagraph.dispatch.route import Route
from graphcap.cudagraph.hardware.device import GraphDevice
from graphcap.cudagraph.recording.layout import Layout


class Worth:
    """The verdicts of one runner."""

    def __init__(self, device: GraphDevice) -> None:
        self._device = device
        self._live: dict[Hashable, Mapping[int, str]] = {}

    def live(self, route: Route) -> Mapping[int, str]:
        """The steps that run live on a route because a graph would not pay, each with the reason."""
        return self._live.get(_family(route), {})

    def scales(self, route: Route, layout: Layout) -> Scales | None:
        """What weighs the segments of a capture, ``None`` where there is nothing to learn.

        Segments that were cut apart for an inspection say nothing about those of an ordinary plan. Where several
        processes work together, their graphs must be cut in the same way, and their clocks differ.
        """
        device = self._device
        if device.stopwatch is None or layout.apart or _family(route) in self._live or _one_of_many():
            return None
        return Scales(device.stopwatch, device.device, device.spare_bytes())

    def judge(
        self, route: Route, before: Layout, weighed: Sequence[Weighed], lay_out: Callable[[Mapping[int, str]], Layout]
    ) -> bool:
        """Take note of a first capture; whether its route should be captured again, with fewer graphs.

        Args:
            route: what was captured.
            before: its layout.
            weighed: its segments.
            lay_out: the layout for this route with these steps live.
        """
        chosen: list[Weighed] = []
        for each in weighed:
            if worth_a_graph(each.live, each.replayed):
                continue
            tried = _live_steps([*chosen, each])
            if lay_out(tried).live.keys() == before.live.keys() | tried.keys():  # it pulls no other step along
                chosen.append(each)
        self._live[_family(route)] = _live_steps(chosen)
        return bool(chosen)


def _family(route: Route) -> Hashable:
    return route.mode, route.batch.uniform_query_len, route.batch.tags


def _live_steps(chosen: Sequence[Weighed]) -> dict[int, str]:
    """Their steps, all with one reason, so that a report has one line for them."""
    if not chosen:
        return {}
    live = _range([each.live.host_us for each in chosen])
    replayed = _range([each.replayed.host_us for each in chosen])
    reason = f"a graph would not pay: {live} us live, {replayed} us replayed"
    return dict.fromkeys((number for each in chosen for number in each.steps), reason)


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return low if low == high else f"{low} to {high}"


def _one_of_many() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
