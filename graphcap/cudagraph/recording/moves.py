"""Inputs that are used in place and move all the same: how often before they stop being used in place."""

from __future__ import annotations

from typing import Any

from graphcap.config import Config
from graphcap.cudagraph.counters.stats import RunnerStats
from graphcap.cudagraph.program import InputKind, Program

LIMIT_STATIC = 2  #: moves that a declared static input may make in short order
LIMIT_TENSOR = 1  #: the same for an argument that is used in place only because it is written or large
SHORT_ORDER = 64  #: calls; an input that keeps its address for longer starts with a clean record


class MoveRecord:
    """How often the inputs that are used in place have moved, and which have moved too often."""

    def __init__(self, program: Program, config: Config) -> None:
        self.unstable: set[int] = set()
        self._program = program
        self._config = config
        self._latest: dict[int, tuple[int, int, int]] = {}  # address, moves in short order, call of the last one

    def note(self, expected: list[int | None], args: tuple[Any, ...], call: int, stats: RunnerStats) -> None:
        """Compare the arguments of a call with the addresses that a plan expects."""
        for index, address in enumerate(expected):
            if address is None or (now := args[index].data_ptr()) == address:
                continue
            before, moves, moved_at = self._latest.get(index, (address, 0, call))
            if now == before:  # another plan has already noticed
                continue
            moves = 1 if call - moved_at > SHORT_ORDER else moves + 1
            self._latest[index] = now, moves, call
            stats.moves[self._program.inputs[index].name] += 1
            if moves > self._allowed(index):
                self.unstable.add(index)

    def _allowed(self, index: int) -> int:
        spec = self._program.inputs[index]
        declared = spec.kind is InputKind.STATIC or spec.name in self._config.static_args
        return LIMIT_STATIC if declared else LIMIT_TENSOR
