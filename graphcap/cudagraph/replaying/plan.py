"""A captured shape, ready to be replayed."""

from __future__ import annotations

import enum
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from graphcap.cudagraph.counters.stats import PlanStats, SizeStats
from graphcap.cudagraph.dispatch.asked import Asked
from graphcap.cudagraph.dispatch.metadata import Serving
from graphcap.cudagraph.dispatch.route import Route
from graphcap.cudagraph.dispatch.step import step
from graphcap.cudagraph.hardware.account import Holding
from graphcap.cudagraph.padded.fitted import Fitter
from graphcap.cudagraph.recording.bindings import Binding
from graphcap.cudagraph.recording.recorded import Recorded


class Unfit(enum.Enum):
    """Why a plan does not serve a call. Nothing has run when a replay returns one of these."""

    MOVED = "a static input has moved"
    CHANGED = "an input has another layout or shares other memory than at capture"


@dataclass(slots=True)
class Plan:
    """A captured shape, ready to be replayed.

    Attributes:
        route: what it is good for.
        replay: takes the tuple of arguments, returns the tuple of outputs or an :class:`Unfit`.
        source: of ``replay``.
        addresses: of the static inputs, by input; ``None`` elsewhere.
        recorded: what must stay alive.
        stats: for reports.
        holding: what the plan holds of the device, in its account.
        serving: the buffers of the step inputs that it reads, if any.
        served: the keys of the calls that it serves.
        num_changed: how many calls in a row found it :attr:`Unfit.CHANGED`.
        fitter: of a padded plan.
        asked: what its ops looked for in the step of the capture; ``None`` where nothing in the plan can have.
    """

    route: Route
    replay: Callable[[Sequence[Any]], Any]
    source: str
    addresses: list[int | None]
    recorded: Recorded
    stats: PlanStats
    holding: Holding
    serving: Serving | None = None
    served: list[Hashable] = field(default_factory=list)
    num_changed: int = 0
    fitter: Fitter | None = None
    asked: Asked | None = None

    def why_not_for(self, said: step | None) -> str:
        """Why the plan does not serve a call in this step, ``""`` where it may: an op that finds another input may go
        another way."""
        if self.asked is None or self.asked.is_alike(said):
            return ""
        return "the step brings other inputs than the one that was captured"

    def fit(self, real: Mapping[str, int]) -> Callable[[Sequence[Any]], Any]:
        """The replay for a call of these sizes, by symbol. To be kept by the caller: a look-up is all it costs then."""
        return self.replay if self.fitter is None else self.fitter.fit(real)


@dataclass(slots=True, eq=False)
class Served:
    """The way from one kind of call to its plan.

    Attributes:
        replay: as :attr:`Plan.replay`, for calls of this kind.
        plan: whose.
        key: by which the runner finds it.
        stats: of the plan.
        holding: of the plan.
        size: counts the calls of this size.
    """

    replay: Callable[[Sequence[Any]], Any]
    plan: Plan
    key: Hashable
    stats: PlanStats
    holding: Holding
    size: SizeStats


def static_addresses(recorded: Recorded) -> list[int | None]:
    """For each input the address it must have, ``None`` where it may lie anywhere."""
    static = set(recorded.layout.inputs_bound(Binding.STATIC))
    indices = range(len(recorded.program.inputs))
    return [recorded.stand_ins[index].data_ptr() if index in static else None for index in indices]
