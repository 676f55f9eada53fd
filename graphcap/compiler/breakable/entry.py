"""The calls of one key: recorded until two recordings agree, then served by the graph runtime.

Every size has a recording of its own. The graph runtime decides which sizes those are: rungs of the ladder where dims
may be padded, else the sizes of calls. What never settles is refused: the function runs as it is, and the report says
why.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch

from graphcap.compiler.breakable import check
from graphcap.compiler.breakable.agree import difference
from graphcap.compiler.breakable.calls import Kind
from graphcap.compiler.breakable.due import Due, When
from graphcap.compiler.breakable.incoming import Incoming, InProgress
from graphcap.compiler.breakable.learning import Learning
from graphcap.compiler.breakable.look import Look, Viewpoint
from graphcap.compiler.breakable.recordings import Recordings
from graphcap.compiler.breakable.rungs import EXACT, Ready, Rungs
from graphcap.compiler.breakable.sized import NotRecorded
from graphcap.compiler.breakable.steps import Surroundings
from graphcap.compiler.region import Region
from graphcap.compiler.rules import SplitRules
from graphcap.config import CUDAGraphMode
from graphcap.cudagraph import GraphDevice, GraphRunner, PlanStats, device_for, graph_runner
from graphcap.cudagraph.dispatch.revision import revision
from graphcap.cudagraph.dispatch.step import current
from graphcap.errors import GuardError

log = logging.getLogger("graphcap.compiler")

_BEFORE_A_PLAN = 2  # calls: the warm-up and the capture
_MAX_BUILT = 5  #: programs; so often results may have other sizes than were expected


class Entry:
    """See the module.

    Attributes:
        region: for the report.
        refused: why these calls run as they are, ``""`` as long as they are recorded or served.
    """

    def __init__(self, region: Region, viewpoint: Viewpoint, largest: Mapping[str, int]) -> None:
        """Nothing is recorded yet.

        Args:
            region: for the report.
            viewpoint: where the function's Python state is reached from.
            largest: the symbols with a largest size, each with it.
        """
        self.region = region
        self.refused = ""
        self._lock = threading.RLock()  # of recordings and comparisons
        self._viewpoint = viewpoint
        self._progress = InProgress()
        self._recordings = Recordings(region.name, largest, self._progress.run, viewpoint)
        self._learning = Learning(self._recordings, viewpoint)
        self._rungs = Rungs(self._recordings, viewpoint, region.config)
        self._num_built = 0
        self._device: GraphDevice | None = None
        self._run: Callable[..., tuple[Any, ...]] | None = None
        self._runner: GraphRunner | None = None
        self._due = Due()
        self._revision: object = None
        self._kinds: dict[Hashable, Ready] = {}  # of calls

    @property
    def unsettled(self) -> str:
        """Why the latest recording was thrown away, ``""`` where it was not."""
        return self._learning.unsettled

    @property
    def is_over(self) -> bool:
        """Whether no call will ever fit again."""
        return self._recordings.watch.is_over

    def fits(self, call: Incoming) -> bool:
        """Whether the Python state is what it was when this entry was made; the call has the tensors from outside
        then."""
        watch = self._recordings.watch
        found = watch.find()
        if found is None:
            return False
        call.outside, call.watch = found, watch
        outside = self._recordings.outside
        return not outside.shared or outside.fits(self._viewpoint.roots(), call.arguments.tensors)

    def call(self, call: Incoming) -> Any:
        """Serve one call.

        Raises:
            GuardError: the function does something else than when it was recorded.
        """
        if self.refused:
            return call.run()
        if self._run is None:
            with self._lock:
                if self._run is None:
                    return self._learn(call)
        return self._serve(call)

    def refuse(self, why: str) -> None:
        """Run these calls as they are from now on."""
        self.refused = self.region.bypass = why
        self._run = self._runner = None
        self._recordings = Recordings(self.region.name, {}, self._progress.run, self._viewpoint)
        self._learning = Learning(self._recordings, self._viewpoint)
        self._rungs = Rungs(self._recordings, self._viewpoint, self.region.config)
        log.warning("%s is not captured and runs eager: %s", self.region.function, why)

    # -- before there is a program -------------------------------------------------------------------------------------

    def _learn(self, call: Incoming) -> Any:
        """Serve a call by the function itself, and look at it."""
        look = self._learning.serve(call)
        if self._learning.refusal:
            self.refuse(self._learning.refusal)
        elif look is not None:
            try:
                self._prepare(call, look)
            except Exception as error:  # a fault of ours must not take the model down
                log.warning("%s: graphcap failed: %s", self.region.name, error, exc_info=True)
                self.refuse(f"graphcap failed: {type(error).__name__}: {error}")
        return call.result

    def _prepare(self, call: Incoming, look: Look) -> None:
        """From the recording to what serves calls from now on."""
        started = time.perf_counter()
        region = self.region
        devices = {value.layout[3] for value in look.recording.values}
        region.no_capture = f"cudagraph_mode=NONE ({region.config.origin('cudagraph_mode')})"
        if region.config.cudagraph_mode is not CUDAGraphMode.NONE:
            self._device, region.no_capture = device_for(devices, region.config.simulate)
        around = Surroundings(
            home=next((each for each in devices if each.type == "cuda"), torch.device("cpu")),
            rules=SplitRules.of(region.config.splitting_ops, ()),
            autocast=[each for each in ("cpu", "cuda") if torch.is_autocast_enabled(each)],
        )
        self._recordings.first(look, call, around)
        outside = self._recordings.outside
        region.notes += filter(None, [outside.note(look.recording)])
        region.watch_tensors([tensor for tensor in self._recordings.watch.tensors if tensor is not None])
        self._start()
        region.seconds = time.perf_counter() - started

    def _start(self) -> None:
        """Serve calls by the program that there is now."""
        region, built = self.region, self._recordings.built
        assert built is not None
        region.pieces, region.source = built.records, built.source
        if self._runner is not None:
            self._runner.release()
            region.crew.detach(self._runner)
        self._run, self._runner, self._kinds = built.program.run, None, {}
        self._num_built = self._recordings.num_built
        if self._device is not None:
            region.device = self._device.name
            # Two calls have been recorded; the runner takes the third one for its first.
            runtime = dataclasses.replace(region.config, capture_after=max(2, region.config.capture_after - 2))
            self._run = graph_runner(built.program, self._device, runtime, self._announced)
        if self._runner is not None and self._num_built >= _MAX_BUILT:
            padding = self._runner.padding
            padding.refuse(list(padding.names), "the sizes of its results follow it in another way from size to size")
        log.info("%s: %d pieces", region.name, len(built.records))

    def _announced(self, runner: GraphRunner) -> None:
        self._runner = runner
        self.region.attach(runner)

    # -- serving by the program ----------------------------------------------------------------------------------------

    def _serve(self, call: Incoming) -> Any:
        if call.watch is not self._recordings.watch and not self.fits(call):
            return call.run()  # another thread has made the program since, or refused
        said = current()
        kind = call.at, None if said is None else said.token
        ready = self._get_ready(call, kind) if call.at else EXACT
        if ready.why:
            self._live(call, ready.why)
        served: bool = call.has_run
        if served:
            return call.result
        runner = self._runner
        if runner is None:
            return call.run()
        inputs = self._recordings.inputs(call)
        outlook = runner.foresee(*inputs)
        when = self._due.when(kind, outlook, call.at, ready.is_padded)
        if when is not When.NEVER:
            with self._lock:
                return self._check(call, inputs, kind, outlook, when)
        outputs = self._outputs(call, inputs)
        return call.result if call.has_run else self._recordings.result.make(call.arguments, outputs)

    def _get_ready(self, call: Incoming, kind: Hashable) -> Ready:
        """Have recorded what such calls need. It may serve the call."""
        now = revision()
        if self._revision is not now:
            self._revision, self._kinds = now, {}
        ready = self._kinds.get(kind)
        if ready is not None or self._runner is None:
            return ready or EXACT
        with self._lock:
            ready = self._rungs.get_ready(call, self._runner)
            self._recorded()
        served: bool = call.has_run
        if not served:
            self._kinds[kind] = ready
        return ready

    def _recorded(self) -> None:
        """Something may have been recorded."""
        if self._recordings.refusal:
            self.refuse(self._recordings.refusal)
        elif self._recordings.num_built != self._num_built:
            self._start()

    def _live(self, call: Incoming, why: str) -> tuple[torch.Tensor, ...]:
        if self._runner is not None:
            self._runner.stats.live_calls[why] += 1
        return call.serve()

    def _outputs(self, call: Incoming, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """What the graph runtime makes of a call; where that ran the function itself, the call says so."""
        run, progress = self._run, self._progress
        if run is None:  # another thread has refused meanwhile
            return call.serve()
        outer = progress.call, progress.inputs
        progress.call, progress.inputs = call, inputs
        try:
            return run(*inputs)
        except NotRecorded as missing:
            at = missing.at
        finally:
            progress.call, progress.inputs = outer
        with self._lock:  # nothing has run
            if at == call.at and self._runner is not None and self._rungs.add(call, self._runner):
                self._recorded()
                return self._outputs(call, inputs)
            return self._live(call, self._recordings.odd.get(at, "nothing is recorded at its sizes"))

    # -- comparing with the function itself ----------------------------------------------------------------------------

    def _check(
        self, call: Incoming, inputs: Sequence[Any], kind: Hashable, outlook: PlanStats | str, when: When
    ) -> Any:
        recordings = self._recordings
        built, reference, runner = recordings.built, recordings.reference, self._runner
        if built is None or reference is None or runner is None:
            return call.run()  # another thread has refused meanwhile
        outside = (value for value in reference.recording.values if value.kind is Kind.OUTSIDE)
        for value, tensor in zip(outside, call.outside, strict=True):
            value.tensor = weakref.ref(tensor)  # a parameter may have been replaced
        same_size = call.at == next(iter(built.at))
        is_padded = not isinstance(outlook, PlanStats) or outlook.key != call.at

        look: Look | None = None

        def watched() -> tuple[Any, Any, str]:
            nonlocal look
            look = self._viewpoint.watch(call.run, call.arguments.tensors, call.arguments, keep=True)
            call.result, call.has_run = look.result, True
            why = look.refusal or recordings.result.difference(look.made)
            if same_size:
                why = why or difference(reference.recording, look.recording)
            return look.recording, look.result, why

        spare = runner.device.spare_bytes()
        outcome = check.compare(
            call, built, lambda *given: self._outputs(call, given), inputs, watched, is_padded, spare
        )
        unchecked = self._due.was_checked(kind, call.ran_live)
        if outcome.skipped:
            runner.stats.unchecked["replays against the function"] = outcome.skipped
            if is_padded and look is not None and not outcome.difference:
                outcome.difference = difference(reference.recording, look.recording, same_size=False)
        if not outcome.difference:
            return (
                outcome.result if outcome.outputs is None else recordings.result.make(call.arguments, outcome.outputs)
            )
        if is_padded and when is When.FIRST:
            runner.padding.refuse(list(runner.padding.names), outcome.difference)
            runner.release()  # its plans serve other sizes than their own
            return outcome.result
        self.refuse(outcome.difference)
        if (outcome.in_python or when is When.AGAIN) and unchecked > _BEFORE_A_PLAN:
            raise GuardError(
                f"{self.region.function} does something else than when it was recorded: {outcome.difference}. The last "
                f"{unchecked} calls may have replayed what it did before. What decides this must be an "
                "argument, or the code around it an @graphcap.eager function."
            )
        return outcome.result
