"""A captured shape, ready to be replayed."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from graphcap.cudagraph.bindings import Binding
from graphcap.cudagraph.fitted import Fitter
from graphcap.cudagraph.recorded import Recorded
from graphcap.cudagraph.stats import PlanStats


class Unfit(enum.Enum):
    """Why a plan does not serve a call. Nothing has run when a replay returns one of these."""

    MOVED = "a static input has moved"
    CHANGED = "an input has another layout or shares other memory than at capture"


@dataclass(slots=True)
class Plan:
    """A captured shape, ready to be replayed.

    Attributes:
        replay: takes the tuple of arguments, returns the tuple of outputs or an :class:`Unfit`.
        source: of ``replay``.
        addresses: of the static inputs, by input; ``None`` elsewhere.
        recorded: what must stay alive.
        stats: for reports.
        num_changed: how many calls in a row found it :attr:`Unfit.CHANGED`.
        fitter: of a padded plan.
    """

    replay: Callable[[tuple[Any, ...]], Any]
    source: str
    addresses: list[int | None]
    recorded: Recorded
    stats: PlanStats
    num_changed: int = 0
    fitter: Fitter | None = None

    def fit(self, real: Mapping[str, int]) -> Callable[[tuple[Any, ...]], Any]:
        """The replay for a call of these sizes, by symbol. To be kept by the caller: a look-up is all it costs then."""
        return self.replay if self.fitter is None else self.fitter.fit(real)


def static_addresses(recorded: Recorded) -> list[int | None]:
    """For each input the address it must have, ``None`` where it may lie anywhere."""
    static = set(recorded.layout.inputs_bound(Binding.STATIC))
    indices = range(len(recorded.program.inputs))
    return [recorded.stand_ins[index].data_ptr() if index in static else None for index in indices]
