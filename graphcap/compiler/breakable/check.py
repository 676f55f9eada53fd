"""A replay against the function itself, on the same inputs, with every effect happening once.

The function runs first, watched, and its results are those of the call. Then what it wrote is put back, and the program
runs from the same state: live steps do not run again, they repeat what they did. If everything agrees the program's
results stand; if not, the function's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphcap.compiler import private
from graphcap.compiler.breakable.limits import generator_states, set_generator_states
from graphcap.compiler.breakable.program import Built
from graphcap.compiler.breakable.record import Recorder


@dataclass
class Outcome:
    """What a comparison found.

    Attributes:
        result: what the function returned.
        outputs: what the program returned, where it stands for the function's.
        difference: the first one, ``""`` where there is none.
        in_python: whether the function took another way than when it was recorded.
    """

    result: Any
    outputs: tuple[Any, ...] | None = None
    difference: str = ""
    in_python: bool = False


def compare(
    built: Built,
    run: Callable[..., tuple[Any, ...]],
    inputs: Sequence[Any],
    watched: Callable[[], tuple[Recorder, Any, str]],
) -> Outcome:
    """Run a call both ways.

    Args:
        built: the program.
        run: what serves calls of it.
        inputs: of this call.
        watched: runs the function itself and keeps what live calls did; says also where it differs from the recording.
    """
    written = sorted({slot for step in built.program.steps for slot in step.mutates if slot < len(inputs)})
    written_names = [built.program.inputs[slot].name for slot in written]
    memory_of, memory = _storages([inputs[slot] for slot in written])
    try:
        before, generators = [each.clone() for each in memory], generator_states()
    except torch.OutOfMemoryError:  # nothing has run yet
        recording, result, why = watched()
        return Outcome(result, difference=why, in_python=bool(why))
    recording, result, why = watched()
    if why:
        return Outcome(result, difference=why, in_python=True)
    live = {number: recording.calls[number].outcome for number in built.lives}
    if None in live.values():
        return Outcome(result)  # a live step that may not run twice cannot be repeated: the calls agree, that is all
    results = [leaf for leaf in private.tree_flatten(result)[0] if isinstance(leaf, torch.Tensor)]
    try:
        expected = [each.clone() for each in results]
        after, generators_after = [each.clone() for each in memory], generator_states()
    except torch.OutOfMemoryError:
        return Outcome(result)
    state = [_within(after[memory_of[private.storage_id(inputs[slot])]], inputs[slot]) for slot in written]
    _restore(memory, before)
    set_generator_states(generators)
    for number, step in built.lives.items():
        step.repeat(live[number])
    try:
        outputs = run(*inputs)
        names = [f"result {index}" for index in range(len(expected))]
        strides = [(mine.stride(), right.stride()) for mine, right in zip(outputs, results, strict=True)]
        if any(mine != right for mine, right in strides):
            raise RuntimeError(f"results of other strides than the function's, (replay, function): {strides}")
        difference = _differ(outputs, expected, names) or _differ([inputs[s] for s in written], state, written_names)
    except Exception as error:  # the function itself has not failed
        difference = f"{type(error).__name__}: {error}"
    finally:
        for step in built.lives.values():
            step.repeat(None)
    if not difference:
        return Outcome(result, outputs)
    _restore(memory, after)
    set_generator_states(generators_after)
    return Outcome(result, difference=difference)


def _storages(tensors: Sequence[torch.Tensor]) -> tuple[dict[int, int], list[torch.Tensor]]:
    """All the bytes that these tensors lie in, each storage once, and where each is in that list."""
    found: dict[int, torch.Tensor] = {}
    with torch.inference_mode(False), torch.no_grad():
        for tensor in tensors:
            storage = tensor.untyped_storage()
            empty = torch.empty(0, dtype=torch.uint8, device=tensor.device)
            found.setdefault(private.storage_id(tensor), empty.set_(storage, 0, (storage.nbytes(),), (1,)))
    return {storage: index for index, storage in enumerate(found)}, list(found.values())


def _within(copy: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The tensor that lies in a copy of a storage as ``like`` lies in the storage."""
    with torch.inference_mode(False), torch.no_grad():
        empty = torch.empty(0, dtype=like.dtype, device=like.device)
        return empty.set_(copy.untyped_storage(), like.storage_offset(), like.size(), like.stride())


def _restore(memory: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    for place, value in zip(memory, values, strict=True):
        place.copy_(value)


def _differ(got: Sequence[Any], expected: Sequence[torch.Tensor], names: Sequence[str]) -> str:
    """The first tensor that is not what it should be, beyond the rounding of its dtype; ``""`` if none."""
    for mine, right, name in zip(got, expected, names, strict=True):
        try:
            torch.testing.assert_close(mine, right, equal_nan=True)
        except AssertionError as error:
            lines = " ".join(str(error).split())
            return f"a replay gave another {name} than the function: {lines}"
    return ""
