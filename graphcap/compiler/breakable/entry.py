"""The calls of one key: recorded until two recordings agree, then served by the graph runtime.

A recording that the function could not repeat (it made something on its first call, it counted its calls) is thrown
away. What never settles is refused: the function runs as it is, and the report says why.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from graphcap.compiler import private
from graphcap.compiler.breakable import check
from graphcap.compiler.breakable.calls import difference
from graphcap.compiler.breakable.key import Arguments
from graphcap.compiler.breakable.origin import module_names
from graphcap.compiler.breakable.outside import Outside, facts, find_outside, shown_name
from graphcap.compiler.breakable.program import Built, build
from graphcap.compiler.breakable.record import Recorder, record
from graphcap.compiler.breakable.result import Result
from graphcap.compiler.breakable.state import changed, snapshot
from graphcap.compiler.breakable.watch import Watch
from graphcap.compiler.frontend.target import is_disabled
from graphcap.compiler.region import Region
from graphcap.compiler.rules import SplitRules
from graphcap.config import CUDAGraphMode
from graphcap.cudagraph import GraphRunner, device_for, graph_runner
from graphcap.errors import GuardError

log = logging.getLogger("graphcap.compiler")

MAX_RECORDINGS = 4  #: calls after which a function that differs from call to call is left alone
CHECKED_REPLAYS = 2  #: of each plan, compared with the function itself
CHECK_EVERY = 256  #: calls; then the function itself runs once more
_BEFORE_A_PLAN = 2  # calls: the warm-up and the capture


class Entry:
    """See the module.

    Attributes:
        region: for the report.
        refused: why these calls run as they are, ``""`` as long as they are recorded or served.
        unsettled: why the latest recording was thrown away, ``""`` where it was not.
    """

    def __init__(self, region: Region, roots: Callable[[], Sequence[Any]], num_own_roots: int) -> None:
        """Nothing is recorded yet.

        Args:
            region: for the report.
            roots: gives what the function's Python state is reached from.
            num_own_roots: how many of them belong to the target; the others are arguments.
        """
        self.region = region
        self.refused = ""
        self.unsettled = ""
        self._lock = threading.RLock()  # of recordings and comparisons
        self._roots = roots
        self._num_own_roots = num_own_roots
        self._watch = Watch(roots, (), facts(roots(), num_own_roots))
        self._outside = Outside([], [])
        self._previous: tuple[Recorder, Result] | None = None
        self._num_recordings = 0
        self._built: Built | None = None
        self._run: Callable[..., tuple[Any, ...]] | None = None
        self._runner: GraphRunner | None = None
        self._plan: Any = None
        self._checks_left = 0
        self._num_calls = 0
        self._num_unchecked = 0

    def fits(self, arguments: Arguments) -> bool:
        """Whether the Python state is what it was when this entry was made."""
        if not self._watch.holds():
            return False
        return not self._outside.shared or self._outside.fits(self._roots(), arguments.tensors)

    def call(self, arguments: Arguments, function: Callable[[], Any], names: Callable[[], list[str]]) -> Any:
        """Serve one call.

        Args:
            arguments: of this call.
            function: runs the call as it is.
            names: of the arguments' leaves.

        Raises:
            GuardError: the function does something else than when it was recorded.
        """
        if self.refused:
            return function()
        run, previous = self._run, self._previous
        if run is None or previous is None:
            with self._lock:
                return self._record(arguments, function, names) if self._run is None else function()
        inputs = [*arguments.tensors, *self._watch.tensors]
        if self._is_due():
            with self._lock:
                return self._check(arguments, inputs, function)
        return previous[1].make(arguments, run(*inputs))

    def refuse(self, why: str) -> None:
        """Run these calls as they are from now on."""
        self.refused = self.region.bypass = why
        self._run = self._runner = self._built = self._previous = None
        self._outside = Outside([], [])
        self._watch = Watch(self._roots, (), facts(self._roots(), self._num_own_roots))
        log.warning("%s is not captured and runs eager: %s", self.region.function, why)

    # -- recording -----------------------------------------------------------------------------------------------------

    def _record(self, arguments: Arguments, function: Callable[[], Any], names: Callable[[], list[str]]) -> Any:
        before = snapshot(self._roots())
        recording, result = self._watched(arguments, function)
        effect = changed(before, snapshot(self._roots()))
        del before
        self._num_recordings += 1
        made = Result.of(result, arguments)
        if self.refused:
            return result
        if recording.refusal or made.odd:
            self.refuse(recording.refusal or made.odd)
            return result
        unsettled = ""
        if effect is not None:
            name = shown_name(effect, arguments, names(), self._num_own_roots)
            unsettled = f"a call changes {name}, which a replay would not do"
        unsettled = unsettled or recording.numbering.outlived(private.tree_flatten(result)[0])
        if not unsettled and self._previous is not None:
            unsettled = self._difference(recording, made)
            if not unsettled:
                try:
                    self._prepare(arguments, recording, made, names())
                except Exception as error:  # a fault of ours must not take the model down
                    log.warning("%s: graphcap failed: %s", self.region.name, error, exc_info=True)
                    self.refuse(f"graphcap failed: {type(error).__name__}: {error}")
                return result
        self._previous, self.unsettled = None if unsettled else (recording, made), unsettled
        if unsettled and self._num_recordings >= MAX_RECORDINGS:
            self.refuse(unsettled)
        return result

    def _difference(self, recording: Recorder, made: Result) -> str:
        assert self._previous is not None
        return difference(self._previous[0], recording) or self._previous[1].difference(made)

    def _watched(self, arguments: Arguments, function: Callable[[], Any], keep: bool = False) -> tuple[Recorder, Any]:
        """Run the function itself, nothing of it compiled, and watch it."""
        own = [root for root in self._roots()[: self._num_own_roots] if isinstance(root, nn.Module)]
        naming = module_names.set({id(module): name for root in own for name, module in root.named_modules()})
        disabling = is_disabled.set(True)
        try:
            with torch.compiler.set_stance("force_eager"):
                return record(function, arguments.tensors, keep)
        finally:
            is_disabled.reset(disabling)
            module_names.reset(naming)

    def _prepare(self, arguments: Arguments, recording: Recorder, made: Result, names: list[str]) -> None:
        """From the recording to what serves calls from now on."""
        started = time.perf_counter()
        region, config, roots = self.region, self.region.config, self._roots()
        outside = find_outside(recording, roots, arguments.tensors)
        devices = {value.layout[3] for value in recording.values}
        device, why = None, f"cudagraph_mode=NONE ({config.origin('cudagraph_mode')})"
        if config.cudagraph_mode is not CUDAGraphMode.NONE:
            device, why = device_for(devices, config.simulate)
        built = build(
            region.name,
            recording,
            [*arguments.tensor_names(names), *outside.names(arguments, names, self._num_own_roots)],
            home=next((each for each in devices if each.type == "cuda"), torch.device("cpu")),
            rules=SplitRules.of(config.splitting_ops, ()),
            autocast=[each for each in ("cpu", "cuda") if torch.is_autocast_enabled(each)],
        )
        region.pieces, region.source, region.no_capture = built.records, built.source, why
        region.notes += filter(None, [outside.note(recording)])
        region.watch_tensors([each.value for each in outside.tensors])
        self._watch = Watch(self._roots, outside.tensors, facts(roots, self._num_own_roots))
        self._outside, self._built, self._previous = outside, built, (recording, made)
        self._run = built.program.run
        if device is not None:
            region.device = device.name
            # Two calls have been recorded; the runner takes the third one for its first.
            runtime = dataclasses.replace(config, capture_after=max(2, config.capture_after - 2))
            self._run = graph_runner(built.program, device, runtime, self._announced)
        region.seconds = time.perf_counter() - started
        log.info("%s: %d pieces", region.name, len(built.records))

    def _announced(self, runner: GraphRunner) -> None:
        self._runner = runner
        self.region.attach(runner)

    # -- comparing with the function itself ----------------------------------------------------------------------------

    def _is_due(self) -> bool:
        """Whether this call is one that is compared with the function itself."""
        self._num_calls += 1
        plans = self._runner.stats.plans if self._runner is not None else ()
        if plans and plans[-1] is not self._plan:
            self._plan, self._checks_left = plans[-1], CHECKED_REPLAYS
        if self._checks_left:
            self._checks_left -= 1
            return True
        self._num_unchecked += 1
        return self._num_calls % CHECK_EVERY == 0

    def _check(self, arguments: Arguments, inputs: list[Any], function: Callable[[], Any]) -> Any:
        if self._built is None or self._run is None or self._previous is None:
            return function()  # another thread has refused meanwhile
        for number, tensor in zip(self._built.outside, self._watch.tensors, strict=True):
            self._previous[0].values[number].tensor = weakref.ref(tensor)  # a parameter may have been replaced

        def watched() -> tuple[Recorder, Any, str]:
            recording, result = self._watched(arguments, function, keep=True)
            made = Result.of(result, arguments)
            return recording, result, recording.refusal or made.odd or self._difference(recording, made)

        outcome = check.compare(self._built, self._run, inputs, watched)
        unchecked, self._num_unchecked = self._num_unchecked, 0
        if not outcome.difference:
            return outcome.result if outcome.outputs is None else self._previous[1].make(arguments, outcome.outputs)
        self.refuse(outcome.difference)
        if outcome.in_python and unchecked > _BEFORE_A_PLAN:
            raise GuardError(
                f"{self.region.function} does something else than when it was recorded: {outcome.difference}. The last "
                f"{unchecked} calls may have replayed what it did before. What decides this must be an "
                "argument, or the code around it an @graphcap.eager function."
            )
        return outcome.result
