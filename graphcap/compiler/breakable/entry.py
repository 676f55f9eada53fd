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
from graphcap.compiler.breakable.due import Due
from graphcap.compiler.breakable.incoming import Incoming, InProgress
from graphcap.compiler.breakable.look import Look, Viewpoint
from graphcap.compiler.breakable.outside import facts
from graphcap.compiler.breakable.output_sizes import tell_apart
from graphcap.compiler.breakable.padded_look import NoRoom, look_unseen, padded_tensors, written_by
from graphcap.compiler.breakable.recordings import MAX_RECORDINGS, Recordings
from graphcap.compiler.breakable.sized import NotRecorded
from graphcap.compiler.breakable.state import walk
from graphcap.compiler.breakable.steps import Surroundings, sample_of
from graphcap.compiler.breakable.watch import Watch
from graphcap.compiler.region import Region
from graphcap.compiler.rules import SplitRules
from graphcap.config import CUDAGraphMode
from graphcap.cudagraph import GraphDevice, GraphRunner, PlanStats, device_for, graph_runner
from graphcap.cudagraph.dispatch.phase import captures_allowed, current_purpose
from graphcap.cudagraph.dispatch.revision import revision
from graphcap.cudagraph.dispatch.step import current
from graphcap.errors import GuardError

log = logging.getLogger("graphcap.compiler")

_BEFORE_A_PLAN = 2  # calls: the warm-up and the capture
_MAX_REBUILDS = 4  #: programs that results of other sizes than were expected may cost
_SPARE_BYTES = 2**30  #: for copies of what a call writes, where there is no device to ask


class Entry:
    """See the module.

    Attributes:
        region: for the report.
        refused: why these calls run as they are, ``""`` as long as they are recorded or served.
        unsettled: why the latest recording was thrown away, ``""`` where it was not.
    """

    def __init__(
        self, region: Region, viewpoint: Viewpoint, largest: Mapping[str, int], ask: Callable[[set[str]], None]
    ) -> None:
        """Nothing is recorded yet.

        Args:
            region: for the report.
            viewpoint: where the function's Python state is reached from.
            largest: the symbols with a largest size, each with it.
            ask: told of inputs of the step that the function reads and that are not among its arguments yet.
        """
        self.region = region
        self.refused = ""
        self.unsettled = ""
        self._lock = threading.RLock()  # of recordings and comparisons
        self._viewpoint, self._ask = viewpoint, ask
        self._watch = self._watch_facts()
        self._progress = InProgress()
        self._recordings = Recordings(region.name, largest, self._progress.run)
        self._num_recordings = self._num_rebuilds = 0
        self._latest: Look | None = None
        self._device: GraphDevice | None = None
        self._run: Callable[..., tuple[Any, ...]] | None = None
        self._runner: GraphRunner | None = None
        self._due = Due()
        self._revision: object = None
        self._kinds: dict[Any, str] = {}  # of calls: why they run as they are, "" where the runtime decides

    def fits(self, call: Incoming) -> bool:
        """Whether the Python state is what it was when this entry was made."""
        if not self._watch.holds():
            return False
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
        self._run = self._runner = self._latest = None
        self._recordings = Recordings(self.region.name, {}, self._progress.run)
        self._watch = self._watch_facts()
        log.warning("%s is not captured and runs eager: %s", self.region.function, why)

    def _watch_facts(self) -> Watch:
        roots = self._viewpoint.roots
        return Watch(roots, (), facts(roots(), self._viewpoint.num_own_roots))

    # -- recording -----------------------------------------------------------------------------------------------------

    def _learn(self, call: Incoming) -> Any:
        """Serve a call before there is a program."""
        look = self._look_here(call)
        if self.refused or look is None:
            return call.result
        self._num_recordings += 1
        recordings = self._recordings
        why = recordings.agreement(look, call.at)
        if why and not look.unsettled and len(recordings.seen) > 1:
            why = self._look_again(call, look)
        self._latest = look
        if not why:
            try:
                self._prepare(call, look)
            except Exception as error:  # a fault of ours must not take the model down
                log.warning("%s: graphcap failed: %s", self.region.name, error, exc_info=True)
                self.refuse(f"graphcap failed: {type(error).__name__}: {error}")
            return call.result
        self.unsettled = why if self._num_recordings > 1 or look.unsettled else ""
        if self._num_recordings >= MAX_RECORDINGS:
            self.refuse(why)
        return call.result

    def _look_here(self, call: Incoming) -> Look | None:
        """Serve a call by the function itself and look at it; ``None`` where that shows that it needs another key."""
        arguments = call.arguments
        if (keeper := current_purpose().keeper) is not None:
            keeper.keep(each for each in self._may_write(call) if id(each) in keeper.lent or not _is_argument(each, call))
        look = self._viewpoint.look(call.run, arguments.tensors, arguments, call.names)
        call.result, call.has_run, look.result = look.result, True, None
        if look.asked - call.step_names:
            self._ask(look.asked)
            return None
        if look.refusal:
            self.refuse(look.refusal)
        return look

    def _look_again(self, call: Incoming, look: Look) -> str:
        """Look a second time at a call that was served, of which nothing is left. Returns why they do not agree."""
        try:
            again = look_unseen(call, self._viewpoint, look.written(), {}, self._spare_bytes())
        except NoRoom as error:
            return str(error)
        again.result = None
        return again.refusal or self._recordings.agreement(again, call.at)

    def _may_write(self, call: Incoming) -> list[torch.Tensor]:
        """The tensors that a call may write: those that an earlier one wrote, or everything but parameters."""
        if self._recordings.built is not None:
            return written_by(self._recordings.built.program, self._inputs(call))
        if self._latest is not None:
            return self._latest.written()
        reached = [found.value for found in walk(self._viewpoint.roots()) if isinstance(found.value, torch.Tensor)]
        return [each for each in (*call.arguments.tensors, *reached) if not isinstance(each, torch.nn.Parameter)]

    def _prepare(self, call: Incoming, look: Look) -> None:
        """From the recording to what serves calls from now on."""
        started = time.perf_counter()
        region, roots = self.region, self._viewpoint.roots()
        devices = {value.layout[3] for value in look.recording.values}
        region.no_capture = f"cudagraph_mode=NONE ({region.config.origin('cudagraph_mode')})"
        if region.config.cudagraph_mode is not CUDAGraphMode.NONE:
            self._device, region.no_capture = device_for(devices, region.config.simulate)
        around = Surroundings(
            home=next((each for each in devices if each.type == "cuda"), torch.device("cpu")),
            rules=SplitRules.of(region.config.splitting_ops, ()),
            autocast=[each for each in ("cpu", "cuda") if torch.is_autocast_enabled(each)],
        )
        recordings = self._recordings
        recordings.first(look, call, roots, self._viewpoint.num_own_roots, around)
        outside = recordings.outside
        region.notes += filter(None, [outside.note(look.recording)])
        region.watch_tensors([each.value for each in outside.tensors])
        self._watch = Watch(
            self._viewpoint.roots, outside.tensors, facts(self._viewpoint.roots(), self._viewpoint.num_own_roots)
        )
        self._start()
        region.seconds = time.perf_counter() - started

    def _start(self) -> None:
        """Serve calls by the program that there is now."""
        region, built = self.region, self._recordings.built
        assert built is not None
        region.pieces, region.source = built.records, built.source
        if self._runner is not None:
            self._runner.release()
        self._run, self._runner = built.program.run, None
        self._kinds = {}
        if self._device is not None:
            region.device = self._device.name
            # Two calls have been recorded; the runner takes the third one for its first.
            runtime = dataclasses.replace(region.config, capture_after=max(2, region.config.capture_after - 2))
            self._run = graph_runner(built.program, self._device, runtime, self._announced)
        log.info("%s: %d pieces", region.name, len(built.records))

    def _start_again(self) -> None:
        """The same, where results had other sizes than the program before says."""
        self._start()
        self._num_rebuilds += 1
        if self._num_rebuilds >= _MAX_REBUILDS and self._runner is not None:
            padding = self._runner.padding
            padding.refuse(list(padding.names), "the sizes of its results follow it in another way at each size")

    def _announced(self, runner: GraphRunner) -> None:
        self._runner = runner
        self.region.attach(runner)

    # -- sizes ---------------------------------------------------------------------------------------------------------

    def _get_ready(self, call: Incoming, inputs: Sequence[Any]) -> str:
        """Record what the graph runtime is going to run for such calls. Returns why they run as they are, ``""`` where
        the runtime decides. It may serve the call."""
        runner = self._runner
        if runner is None or not captures_allowed():
            return ""
        routes = runner.router.routes(call.at[0] if len(call.at) == 1 else call.at, current())
        for route in () if isinstance(routes, str) else routes:
            if not route.rung or runner.padding.why_not_to(route.rung, inputs):
                continue
            why = self._record_rung(call, inputs, runner, route.rung)
            if why or call.has_run or self.refused:
                return why
        return ""

    def _record_rung(
        self, call: Incoming, inputs: Sequence[Any], runner: GraphRunner, rung: Mapping[str, int]
    ) -> str:
        """Record a call at the sizes of a rung. Returns why that is not possible."""
        recordings, real = self._recordings, call.arguments.sizes.values
        assert recordings.built is not None
        goal = runner.padding.goal(inputs, rung)
        values = {symbol: goal[symbol] for symbol in real}
        at = tuple(values.values())
        if at not in recordings.built.at and at not in recordings.odd:
            if at == call.at:
                self._record_here(call)
                return ""
            if why := self._record_padded(call, inputs, runner, rung, values):
                return why
        if why := recordings.odd.get(at, ""):
            shown = ", ".join(f"{symbol}={size}" for symbol, size in values.items())
            return f"not captured at {shown}: {why}"
        if not tell_apart(recordings.samples, real, values):
            self._record_here(call)
        return ""

    def _record_here(self, call: Incoming) -> None:
        """Serve a call by the function itself, and record it at its own sizes."""
        look = self._look_here(call)
        if self.refused or look is None:
            return
        recordings, values = self._recordings, call.arguments.sizes.values
        if why := recordings.agreement(look, call.at):
            recordings.disagreed(call.at, why)
            is_another = recordings.sample(sample_of(look.recording, values))
        else:
            is_another = recordings.add(look, values, self._watch.tensors)
        if is_another:
            self._start_again()

    def _record_padded(
        self, call: Incoming, inputs: Sequence[Any], runner: GraphRunner, rung: Mapping[str, int], values: Mapping[str, int]
    ) -> str:
        """Record a call padded to other sizes, of which nothing is left. Returns why that is not possible now."""
        recordings = self._recordings
        assert recordings.built is not None
        at, why = tuple(values.values()), ""
        for _ in range(2):
            try:
                replaced = {}
                if at != call.at:
                    replaced = padded_tensors(call, runner.padding, inputs, rung, self.region.config)
                written = written_by(recordings.built.program, inputs)
                look = look_unseen(call, self._viewpoint, written, replaced, runner.device.spare_bytes())
            except NoRoom as error:
                return f"not recorded at {at}: {error}"
            except Exception as error:  # of the function, or of a fill
                runner.padding.refuse(rung, f"the padded call fails: {type(error).__name__}: {error}")
                return ""
            look.result = None
            why = look.refusal or recordings.agreement(look, at)
            if not why:
                if recordings.add(look, values, self._watch.tensors):
                    self._start_again()
                return ""
        recordings.odd[at] = why
        return ""

    def _spare_bytes(self) -> int:
        return _SPARE_BYTES if self._device is None else self._device.spare_bytes()

    # -- serving -------------------------------------------------------------------------------------------------------

    def _inputs(self, call: Incoming) -> list[Any]:
        return [*call.arguments.tensors, *call.at, *self._watch.tensors]

    def _serve(self, call: Incoming) -> Any:
        """Serve a call by the program."""
        inputs, said = self._inputs(call), current()
        kind = call.at, None if said is None else said.token
        if call.at:
            if self._revision is not revision():
                self._revision, self._kinds = revision(), {}
            why = self._kinds.get(kind)
            if why is None:
                with self._lock:
                    why = self._kinds[kind] = self._get_ready(call, inputs)
                if call.has_run:
                    self._kinds.pop(kind, None)
                    return call.result
            if why:
                return self._live(call, why)
        runner = self._runner
        if runner is not None:
            outlook = runner.outlook(*inputs)
            if self._due.is_due(kind, outlook, call.at, bool(call.at)):
                with self._lock:
                    return self._check(call, inputs, kind, isinstance(outlook, PlanStats) and outlook.key == call.at)
        outputs = self._outputs(call, inputs)
        return call.result if call.has_run else self._recordings.result.make(call.arguments, outputs)

    def _live(self, call: Incoming, why: str) -> Any:
        if self._runner is not None:
            self._runner.stats.live_calls[why] += 1
        return call.serve()

    def _outputs(self, call: Incoming, inputs: Sequence[Any]) -> Any:
        """What the graph runtime makes of a call; where that ran the function itself, the call says so."""
        run, progress = self._run, self._progress
        if run is None:  # another thread has refused meanwhile
            return call.serve()
        outer, progress.call = progress.call, call
        try:
            return run(*inputs)
        except NotRecorded as missing:
            at = missing.at
        finally:
            progress.call = outer
        return self._not_recorded(call, inputs, at)

    def _not_recorded(self, call: Incoming, inputs: Sequence[Any], at: tuple[int, ...]) -> Any:
        """A call came to a size that was never recorded. Nothing has run."""
        with self._lock:
            recordings, runner = self._recordings, self._runner
            if at != call.at or runner is None or recordings.built is None or at in recordings.odd:
                return self._live(call, f"not recorded at {at}")
            if at in recordings.built.at:
                return self._outputs(call, inputs)
            why = self._record_padded(call, inputs, runner, {}, call.arguments.sizes.values)
            if why:
                return self._record_here(call)
        return self._live(call, recordings.odd[at]) if at in recordings.odd else self._outputs(call, inputs)

    # -- comparing with the function itself ----------------------------------------------------------------------------

    def _check(self, call: Incoming, inputs: Sequence[Any], kind: Hashable, at_own_size: bool) -> Any:
        recordings = self._recordings
        built, reference = recordings.built, recordings.reference
        if built is None or reference is None:
            return call.run()  # another thread has refused meanwhile
        outside = (value for value in reference.recording.values if value.kind is Kind.OUTSIDE)
        for value, tensor in zip(outside, self._watch.tensors, strict=True):
            value.tensor = weakref.ref(tensor)  # a parameter may have been replaced
        same_size = call.at == next(iter(built.at))

        def watched() -> tuple[Any, Any, str]:
            look = self._viewpoint.watch(call.run, call.arguments.tensors, call.arguments, keep=True)
            call.result, call.has_run = look.result, True
            why = look.refusal
            if same_size:
                why = why or difference(reference.recording, look.recording) or reference.made.difference(look.made)
            return look.recording, look.result, why

        outcome = check.compare(call, built, lambda *given: self._outputs(call, given), inputs, watched, not at_own_size)
        unchecked = self._due.was_checked(kind, call.ran_live)
        if not outcome.difference:
            return outcome.result if outcome.outputs is None else recordings.result.make(call.arguments, outcome.outputs)
        self.refuse(outcome.difference)
        if outcome.in_python and unchecked > _BEFORE_A_PLAN:
            raise GuardError(
                f"{self.region.function} does something else than when it was recorded: {outcome.difference}. The last "
                f"{unchecked} calls may have replayed what it did before. What decides this must be an "
                "argument, or the code around it an @graphcap.eager function."
            )
        return outcome.result


def _is_argument(tensor: torch.Tensor, call: Incoming) -> bool:
    return any(tensor is each for each in call.arguments.tensors)
