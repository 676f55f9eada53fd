"""What a runner consists of, for those that do its work."""

from __future__ import annotations

from dataclasses import dataclass

from graphcap.config import Config
from graphcap.cudagraph.attempts import Attempts
from graphcap.cudagraph.device import GraphDevice
from graphcap.cudagraph.moves import MoveRecord
from graphcap.cudagraph.padding import Padding
from graphcap.cudagraph.plan_table import PlanTable
from graphcap.cudagraph.program import Program
from graphcap.cudagraph.routes import Router
from graphcap.cudagraph.stats import RunnerStats


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
