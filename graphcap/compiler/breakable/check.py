"""A replay against the function itself, on the same inputs, with every effect happening once.

The function runs first, watched, and its results are those of the call. Then what it wrote is put back, and the program
runs from the same state: live steps do not run again, they repeat what they did. If everything agrees the program's
results stand; if not, the function's. A padded replay is compared with the function at the real size.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphcap.compiler import private
from graphcap.compiler.breakable import calls
from graphcap.compiler.breakable.differ import differ, differ_when_padded, require_same_forms, spreads
from graphcap.compiler.breakable.incoming import Incoming
from graphcap.compiler.breakable.program import Built
from graphcap.compiler.breakable.record import Recorder
from graphcap.compiler.breakable.undo import Copy, Memory
from graphcap.cudagraph.checks.rounding import TooUnsteady

_NO_ROOM = "what a call writes is too large to be copied"


@dataclass
class Outcome:
    """What a comparison found.

    Attributes:
        result: what the function returned.
        outputs: what the program returned, where it stands for the function's.
        difference: the first one, ``""`` where there is none.
        in_python: whether the function took another way than when it was recorded.
        skipped: why nothing was compared but the operators, ``""`` where more was.
    """

    result: Any
    outputs: tuple[Any, ...] | None = None
    difference: str = ""
    in_python: bool = False
    skipped: str = ""


@dataclass
class _Ran:
    """A call that the function has run, to be run by the program.

    Attributes:
        built: the program.
        inputs: of the call.
        written: the slots of inputs that are written.
        live: what each live step did.
        memory: what is written.
        before: what was there before the call.
        after: what the function left there.
        result: what it returned.
        expected: the tensors in that, as they were then.
    """

    built: Built
    inputs: Sequence[Any]
    written: list[int]
    live: list[calls.Outcome]
    memory: Memory
    before: Copy
    after: Copy
    result: Any
    expected: list[torch.Tensor]

    def put_back(self) -> None:
        """Have everything as it was before the call; live steps repeat what they did, once."""
        self.memory.restore(self.before)
        for step, outcome in zip(self.built.lives, self.live, strict=True):
            step.repeat(outcome)

    def names(self) -> list[str]:
        """Of the results, and of the inputs that are written."""
        results = [f"result {index}" for index in range(len(self.expected))]
        return results + [self.built.program.inputs[slot].name for slot in self.written]

    def written_in(self, copy: Copy) -> list[torch.Tensor]:
        """The inputs that are written, as they are in a copy."""
        return [self.memory.within(copy, self.inputs[slot]) for slot in self.written]


def compare(
    call: Incoming,
    built: Built,
    run: Callable[..., tuple[Any, ...]],
    inputs: Sequence[Any],
    watched: Callable[[], tuple[Recorder, Any, str]],
    is_padded: bool,
    max_bytes: int,
) -> Outcome:
    """Run a call both ways.

    Args:
        call: of which nothing has run.
        built: the program.
        run: what serves calls of it.
        inputs: of this call.
        watched: runs the function itself and keeps what live calls did; says also where it differs from the recording.
        is_padded: whether the program may run at a larger size, where other kernels round in another way.
        max_bytes: that copies of what the call writes may take.
    """
    ran = _run_function(built, inputs, watched, max_bytes)
    if isinstance(ran, Outcome):
        return ran
    call.redo = functools.partial(ran.memory.restore, ran.after)
    ran.put_back()
    differs = skipped = ""
    try:
        outputs = run(*inputs)
        differs = _difference(ran, outputs, is_padded)
    except TooUnsteady as error:
        skipped = str(error)
    except Exception as error:  # the function itself has not failed
        differs = f"{type(error).__name__}: {error}"
    finally:
        call.redo = None
        for step in built.lives:
            step.repeat(None)
    if not differs and not skipped:
        return Outcome(ran.result, None if call.ran_live else outputs)
    ran.memory.restore(ran.after)
    return Outcome(ran.result, difference=differs, skipped=skipped)


def _run_function(
    built: Built, inputs: Sequence[Any], watched: Callable[[], tuple[Recorder, Any, str]], max_bytes: int
) -> _Ran | Outcome:
    """The function's own run, or all there is to say about this call."""
    written = sorted({slot for step in built.program.steps for slot in step.mutates if slot < len(inputs)})
    memory = Memory([inputs[slot] for slot in written])
    try:
        before = memory.copy() if 2 * memory.nbytes <= max_bytes else None
    except torch.OutOfMemoryError:
        before = None
    if before is None:  # nothing has run yet
        _, result, why = watched()
        return Outcome(result, difference=why, in_python=bool(why), skipped=_NO_ROOM)
    recording, result, why = watched()
    if why:
        return Outcome(result, difference=why, in_python=True)
    did = [_by_position(each) for each in recording.calls if each.live]
    live = [each for each in did if each is not None]
    if not len(live) == len(did) == len(built.lives):
        return Outcome(result, skipped="a live step hands out memory from outside, and cannot be repeated")
    try:
        expected, after = [each.clone() for each in _tensors(result)], memory.copy()
    except torch.OutOfMemoryError:
        return Outcome(result, skipped=_NO_ROOM)
    return _Ran(built, inputs, written, live, memory, before, after, result, expected)


def _tensors(result: Any) -> list[torch.Tensor]:
    return [leaf for leaf in private.tree_flatten(result)[0] if isinstance(leaf, torch.Tensor)]


def _difference(ran: _Ran, outputs: Sequence[Any], is_padded: bool) -> str:
    """The first value that the program has left otherwise than the function, ``""`` if none.

    Raises:
        TooUnsteady: some differ, and rounding alone moves them as far.
        Exception: a step of the program fails.
    """
    require_same_forms(outputs, _tensors(ran.result))
    names = ran.names()
    got, expected = [*outputs, *(ran.inputs[slot] for slot in ran.written)], [*ran.expected, *ran.written_in(ran.after)]
    if is_padded:
        return differ_when_padded(got, expected, names)
    found = differ(got, expected, names)
    if not found:
        return ""
    try:
        left = ran.memory.copy()
        by_rounding = spreads(ran.built.program, ran.inputs, ran.written, ran.put_back)
    except Exception:  # no room for it, mostly
        return found
    ran.memory.restore(left)
    return differ(got, expected, names, by_rounding)


def _by_position(call: calls.Call) -> calls.Outcome | None:
    """What a live call did, with what it wrote by position among what it reads."""
    did = call.outcome
    if did is None:
        return None
    reads = call.reads()
    written = {reads.index(number): each for number, each in did.written.items()}
    return dataclasses.replace(did, written=written)
