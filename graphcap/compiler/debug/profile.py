"""``graphcap.profile()``: what each step of a model takes eager, compiled and replayed, and where time is lost."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphcap.compiler import private
from graphcap.compiler.debug.profile_table import table
from graphcap.compiler.debug.state import SavedState
from graphcap.compiler.frontend.subject import regions_of, subject_of
from graphcap.compiler.region import PieceRecord, Region
from graphcap.cudagraph import GraphRunner
from graphcap.cudagraph.checks.profile import Timers, timed
from graphcap.cudagraph.dispatch.phase import allow_capture
from graphcap.cudagraph.hardware.generators import same_random_numbers

REPEATS = 15  #: calls that are timed; every figure is a median over them
_MAX_CALLS = 12  #: in which a graph has to be there


@dataclass(frozen=True)
class ProfileRow:
    """One step of a plan. Times are microseconds, medians; ``None`` where a way to run it was not there.

    Attributes:
        region: the region's name.
        step: the piece.
        where: the module that wrote its first operation.
        eager_us: as plain Python.
        compiled_us: compiled, without a graph.
        replayed_us: from a graph of its own.
        live_us: of a step that the plan runs live.
    """

    region: str
    step: str
    where: str
    eager_us: float | None
    compiled_us: float | None
    replayed_us: float | None
    live_us: float | None

    @property
    def us(self) -> float:
        """As the plan runs it."""
        return self.replayed_us or self.live_us or 0.0

    @property
    def lost_us(self) -> float:
        """What the fastest of the other ways would save; 0 where the plan runs it the fastest way."""
        others = [each for each in (self.eager_us, self.compiled_us) if each is not None]
        return max(0.0, self.us - min(others)) if others else 0.0


@dataclass(frozen=True)
class Profile:
    """What the steps of one call take.

    Attributes:
        target: the name of what was called.
        device: ``"cuda:0"``, ``"simulated"``; ``""`` where nothing was captured.
        call_us: the whole call with the plan as it is, microseconds, the device's work included.
        rows: where time was lost first, then the longest.
        repeats: how many calls were timed.
        message: why there are no rows, ``""`` otherwise.
    """

    target: str
    device: str
    call_us: float
    rows: tuple[ProfileRow, ...]
    repeats: int
    message: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return table(self)


def profile(model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Profile:
    """Time every step of a call: eager, compiled, and replayed from a graph.

    The model is called until it replays a graph, then :data:`REPEATS` times more as it is, and as often with each step
    recorded in a graph of its own. Tensors that the calls change are put back each time (see
    :class:`~graphcap.compiler.debug.state.SavedState` for which), and one more call is made at the end: the model is
    then as after a single call. Do not call it from another thread meanwhile.

    Args:
        model: what ``torch.compile`` or ``graphcap.compile`` returned, or an instance of a decorated class.
        args, kwargs: of the call. Call this under the grad or inference mode in which the model is used.

    Raises:
        GraphcapError: the tensors that the calls may change are too large to be copied.
        Exception: what the model raises.
    """
    state = SavedState(model, args, kwargs)

    def call() -> None:
        model(*args, **kwargs)

    used = torch.cuda.is_initialized()
    device = torch.device("cuda", torch.cuda.current_device()) if used else torch.device("cpu")
    with same_random_numbers(device):
        active = _until_replayed(call, model, state)
        original, _ = private.original_of(model)
        name = getattr(original, "__qualname__", type(original).__qualname__)
        found = _measure(name, call, state, active) if active else Profile(name, "", 0.0, (), 0, _why_none(model))
    call()
    return found


_Active = Sequence[tuple[Region, GraphRunner]]


def _until_replayed(call: Callable[[], None], model: Any, state: SavedState) -> _Active:
    """Call until graphs are replayed; the regions and runners that do."""
    for _ in range(_MAX_CALLS):
        before = {id(runner): runner.stats.replays for _, runner in _runners(model)}
        call()
        state.restore()
        active = [(r, runner) for r, runner in _runners(model) if runner.stats.replays > before.get(id(runner), 0)]
        if active:
            return active
    return ()


def _runners(model: Any) -> _Active:
    subject = subject_of(model)
    return [(region, runner) for region in subject.regions() for runner in subject.runners_in(region)]


def _measure(name: str, call: Callable[[], None], state: SavedState, active: _Active) -> Profile:
    device = active[0][1].device
    seconds = []
    for _ in range(REPEATS):
        seconds.append(timed(call, device.device)[1])
        state.restore()
    timers = [(region, runner, Timers(runner.program, device.device)) for region, runner in active]
    with contextlib.ExitStack() as inspected, allow_capture(True):
        for _, runner, clock in timers:
            inspected.enter_context(runner.inspected(clock))
        for _ in range(1 + REPEATS):  # the first one captures
            call()
            state.restore()
    rows = [row for region, _, clock in timers for row in _rows(region, clock)]
    rows.sort(key=lambda row: (-row.lost_us, -row.us))
    return Profile(name, device.name, statistics.median(seconds) * 1e6, tuple(rows), REPEATS)


def _rows(region: Region, clock: Timers) -> list[ProfileRow]:
    pieces: dict[str, PieceRecord] = {piece.name: piece for piece in region.pieces}
    rows = []
    for number, samples in sorted(clock.samples.items()):
        step = clock.program.steps[number].name
        us = {way: statistics.median(seconds) * 1e6 for way, seconds in samples.items()}
        where = pieces[step].module_path if step in pieces else ""
        times = (us.get(way) for way in ("eager", "compiled", "replayed", "live"))
        rows.append(ProfileRow(region.name, step, where, *times))
    return rows


def _why_none(model: Any) -> str:
    """Why no graph was replayed."""
    regions = regions_of(model)
    if not regions:
        return "nothing of it was compiled through graphcap; see graphcap.explain()"
    reasons = [region.bypass or region.no_capture for region in regions]
    reasons += [reason for _, runner in _runners(model) for reason in runner.stats.live_calls]
    known = list(dict.fromkeys(filter(None, reasons)))
    return f"no graph was replayed in {_MAX_CALLS} calls: {'; '.join(known) or 'see graphcap.explain()'}"
