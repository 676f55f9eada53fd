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
from graphcap.compiler.breakable.incoming import Incoming
from graphcap.compiler.breakable.program import Built
from graphcap.compiler.breakable.record import Recorder
from graphcap.compiler.breakable.undo import Memory
from graphcap.cudagraph.padded.compare import departs

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
    live = [_by_position(call) for call in recording.calls if call.live]
    if len(live) != len(built.lives) or None in live:
        return Outcome(result, skipped="a live step hands out memory from outside, and cannot be repeated")
    results = [leaf for leaf in private.tree_flatten(result)[0] if isinstance(leaf, torch.Tensor)]
    try:
        expected, after = [each.clone() for each in results], memory.copy()
    except torch.OutOfMemoryError:
        return Outcome(result, skipped=_NO_ROOM)
    state = [memory.within(after, inputs[slot]) for slot in written]
    call.redo = functools.partial(memory.restore, after)
    memory.restore(before)
    for step, outcome in zip(built.lives, live, strict=True):
        step.repeat(outcome)
    differ = _departs if is_padded else _differ
    try:
        outputs = run(*inputs)
        names = [f"result {index}" for index in range(len(expected))]
        forms = [(_form(mine), _form(right)) for mine, right in zip(outputs, results, strict=True)]
        if any(mine != right for mine, right in forms):
            raise RuntimeError(f"results of another form than the function's, (replay, function): {forms}")
        written_names = [built.program.inputs[slot].name for slot in written]
        difference = differ(outputs, expected, names) or differ([inputs[s] for s in written], state, written_names)
    except Exception as error:  # the function itself has not failed
        difference = f"{type(error).__name__}: {error}"
    finally:
        call.redo = None
        for step in built.lives:
            step.repeat(None)
    if not difference:
        return Outcome(result, None if call.ran_live else outputs)
    memory.restore(after)
    return Outcome(result, difference=difference)


def _by_position(call: calls.Call) -> calls.Outcome | None:
    """What a live call did, with what it wrote by position among what it reads."""
    did = call.outcome
    if did is None:
        return None
    reads = call.reads()
    written = {reads.index(number): each for number, each in did.written.items()}
    return dataclasses.replace(did, written=written)


def _form(tensor: torch.Tensor) -> tuple[Any, ...]:
    strides = tuple(stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)
    return tensor.dtype, tuple(tensor.shape), strides


def _differ(got: Sequence[Any], expected: Sequence[torch.Tensor], names: Sequence[str]) -> str:
    """The first tensor that is not what it should be, beyond the rounding of its dtype; ``""`` if none."""
    for mine, right, name in zip(got, expected, names, strict=True):
        try:
            torch.testing.assert_close(mine, right, equal_nan=True)
        except AssertionError as error:
            lines = " ".join(str(error).split())
            return f"a replay gave another {name} than the function: {lines}"
    return ""


def _departs(got: Sequence[Any], expected: Sequence[torch.Tensor], names: Sequence[str]) -> str:
    """The same for two sizes of one call."""
    for mine, right, name in zip(got, expected, names, strict=True):
        if departs(mine, right):
            return f"a padded replay gave another {name} than the function at the real size"
    return ""
