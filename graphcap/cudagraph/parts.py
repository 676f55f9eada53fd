"""What a runner consists of, for those that do its work."""

from __future__ import annotations

from dataclasses import dataclass

from graphcap.config import Config
from graphcap.cudagraph.agreement import Agreement
from graphcap.cudagraph.counters.stats import RunnerStats
from graphcap.cudagraph.dispatch.route import Route
from graphcap.cudagraph.dispatch.routes import Router
from graphcap.cudagraph.hardware.device import GraphDevice
from graphcap.cudagraph.padded.padding import Padding
from graphcap.cudagraph.program import Program
from graphcap.cudagraph.recording.attempts import Attempts
from graphcap.cudagraph.recording.moves import MoveRecord
from graphcap.cudagraph.replaying.plan_table import PlanTable


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of one runner, each described where it is defined."""

    program: Program
    device: GraphDevice
    config: Config
    padding: Padding
    router: Router
    table: PlanTable
    attempts: Attempts
    moves: MoveRecord
    stats: RunnerStats
    agreement: Agreement

    def question(self, what: str, route: Route) -> str:
        """What the ranks of a group are asked about a route; the same on all of them."""
        group = self.agreement.is_group
        return f"{self.program.name}: {what}, {route.mode.name} {route.sizes}" if group else ""
