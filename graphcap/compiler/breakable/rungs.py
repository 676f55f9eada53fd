"""Recording at the sizes that the graph runtime is going to run, before it does.

A call of exactly such sizes is recorded while the function itself serves it. One that is padded to them runs once more
for the recording, and nothing is left of that. What the sizes of results follow shows in calls of different sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from graphcap.compiler.breakable.incoming import Incoming
from graphcap.compiler.breakable.look import Viewpoint
from graphcap.compiler.breakable.output_sizes import tell_apart
from graphcap.compiler.breakable.padded_look import NoRoom, look_unseen, padded_tensors, written_by
from graphcap.compiler.breakable.recordings import Recordings
from graphcap.compiler.breakable.sized import At
from graphcap.compiler.breakable.steps import sample_of
from graphcap.compiler.breakable.undo import Memory
from graphcap.config import Config
from graphcap.cudagraph import GraphRunner
from graphcap.cudagraph.dispatch.phase import captures_allowed
from graphcap.cudagraph.dispatch.step import current
from graphcap.cudagraph.recording.recorded import describe

_COPIES = 3  #: of what a call writes, in a proof of padding
_LOOKS = 2  #: at a padded call; two that agree where one alone says too little


class Ready(NamedTuple):
    """What is known of calls of one kind before they come to the graph runtime.

    Attributes:
        why: why they run as they are, ``""`` where the runtime decides.
        is_padded: whether they may be padded, and compared.
    """

    why: str = ""
    is_padded: bool = False


EXACT, PADDED = Ready(), Ready(is_padded=True)


class Rungs:
    """Records for one entry."""

    def __init__(self, recordings: Recordings, viewpoint: Viewpoint, config: Config) -> None:
        """Add to ``recordings``, which has a program."""
        self._recordings, self._viewpoint, self._config = recordings, viewpoint, config

    def get_ready(self, call: Incoming, runner: GraphRunner) -> Ready:
        """Record what the graph runtime is going to run for such calls. It may serve the call."""
        if not captures_allowed():
            return PADDED
        recordings = self._recordings
        inputs, ready = recordings.inputs(call), EXACT
        routes = runner.router.routes(call.at[0] if len(call.at) == 1 else call.at, current())
        for route in () if isinstance(routes, str) else routes:
            if route.rung and not runner.padding.why_not_to(route.rung, inputs):
                has_room = self._has_room(runner, inputs)
                ready = PADDED if has_room else EXACT
                if why := self._rung(call, inputs, runner, route.rung, has_room):
                    return Ready(why)
            elif not route.rung and self._lacks(call.at) and runner.foresee(*inputs) == "":
                self._here(call)
            if call.has_run:
                break
        return ready

    def add(self, call: Incoming, runner: GraphRunner) -> bool:
        """Record a call at its own sizes, without serving it. Returns whether there is a recording now."""
        if self._lacks(call.at):
            self._padded(call, self._recordings.inputs(call), runner, {}, call.arguments.sizes.values)
        built = self._recordings.built
        return built is not None and call.at in built.at

    def _rung(
        self, call: Incoming, inputs: Sequence[Any], runner: GraphRunner, rung: Mapping[str, int], has_room: bool
    ) -> str:
        recordings, real = self._recordings, call.arguments.sizes.values
        goal = runner.padding.goal(inputs, rung)
        values = {symbol: goal[symbol] for symbol in real}
        at = tuple(values.values())
        if self._lacks(at):
            if at == call.at:
                self._here(call)
                return ""
            if why := self._padded(call, inputs, runner, rung, values):
                return why
        if why := recordings.odd.get(at, "") or recordings.odd.get(call.at, ""):
            shown = ", ".join(f"{symbol}={size}" for symbol, size in values.items())
            return f"nothing is recorded at {shown}: {why}"
        if not tell_apart(recordings.samples, real, values) or (not has_room and self._lacks(call.at)):
            self._here(call)
        elif not has_room and not {at, call.at} <= recordings.alike:
            return "what it writes is too large for a comparison, and more than sizes differs from size to size"
        return ""

    def _has_room(self, runner: GraphRunner, inputs: Sequence[Any]) -> bool:
        """Whether what a call writes can be copied. Otherwise padded calls cannot be compared with the function, and a
        proof runs the call at its own size as well: what is recorded there has to do."""
        assert self._recordings.built is not None
        memory = Memory(written_by(self._recordings.built.program, inputs))
        return _COPIES * memory.nbytes <= runner.device.spare_bytes()

    def _lacks(self, at: At) -> bool:
        built = self._recordings.built
        return built is not None and at not in built.at and at not in self._recordings.odd

    def _here(self, call: Incoming) -> None:
        """Serve a call by the function itself, and record it at its own sizes."""
        recordings, values = self._recordings, call.arguments.sizes.values
        assert recordings.built is not None
        look = self._viewpoint.here(call, written_by(recordings.built.program, recordings.inputs(call)))
        if look is None:
            return
        recordings.refusal = look.refusal
        if look.refusal:
            return
        if why := recordings.agreement(look, call.at):
            recordings.disagreed(call.at, why)
            recordings.sample(sample_of(look.recording, values))
        else:
            recordings.add(look, values)

    def _padded(
        self,
        call: Incoming,
        inputs: Sequence[Any],
        runner: GraphRunner,
        rung: Mapping[str, int],
        values: Mapping[str, int],
    ) -> str:
        """Record a call padded to other sizes, of which nothing is left. Returns why that is not possible now."""
        recordings, at, why = self._recordings, tuple(values.values()), ""
        assert recordings.built is not None
        written = written_by(recordings.built.program, inputs)
        for _ in range(_LOOKS):
            try:
                replaced = padded_tensors(call, runner.padding, inputs, rung, self._config) if rung else {}
                look = look_unseen(call, self._viewpoint, written, replaced, runner.device.spare_bytes())
            except NoRoom as error:
                return f"padded sizes are not recorded: {error}"
            except Exception as error:  # of the function, or of a fill
                if not rung:
                    raise  # as it would without us
                runner.padding.refuse(rung, f"the padded call fails: {describe(error)}")
                return ""
            look.result = None
            why = look.refusal or recordings.agreement(look, at)
            if not why:
                recordings.add(look, values)
                return ""
        recordings.odd[at] = why
        return ""
