"""Where what a program has left differs from what the function left, and how far rounding alone moves it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from graphcap.compiler import private
from graphcap.cudagraph import Constant, Program
from graphcap.cudagraph.checks.differences import difference
from graphcap.cudagraph.checks.rounding import beyond_rounding, nudged, spread
from graphcap.cudagraph.padded.compare import departs
from graphcap.cudagraph.recording.recorded import run_live


class _Nudging(TorchDispatchMode):
    """Moves the floats that an operator has made; what it has written or what is a view of something else stays."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if any(each.alias_info is not None for each in func._schema.returns):
            return results
        leaves, spec = private.tree_flatten(results)
        return private.tree_unflatten(nudged(leaves, ()), spec)


def spreads(
    program: Program, inputs: Sequence[Any], written: Sequence[int], put_back: Callable[[], None]
) -> list[float]:
    """For each result, and after them for each input that is written, how far rounding moves its rows.

    Args:
        program: runs live.
        inputs: of the call.
        written: the slots of inputs that it writes.
        put_back: has the next run find everything as it was before the call.

    Raises:
        Exception: what a step raises.
    """

    def left_by_run(mode: AbstractContextManager[Any]) -> list[Any]:
        put_back()
        slots = [*inputs, *(None for step in program.steps for _ in step.writes)]
        with mode:
            run_live(program, slots, 0)
        results = [each.value if isinstance(each, Constant) else slots[each] for each in program.outputs]
        left = [*results, *(inputs[slot] for slot in written)]
        return [each.clone() if isinstance(each, torch.Tensor) else each for each in left]

    return list(map(spread, left_by_run(contextlib.nullcontext()), left_by_run(_Nudging())))


def require_same_forms(outputs: Sequence[Any], results: Sequence[torch.Tensor]) -> None:
    """See that results of the program have the dtypes, sizes and strides of the function's.

    Raises:
        RuntimeError: they have not.
    """
    forms = [(_form(mine), _form(right)) for mine, right in zip(outputs, results, strict=True)]
    if any(mine != right for mine, right in forms):
        raise RuntimeError(f"results of another form than the function's, (replay, function): {forms}")


def _form(tensor: torch.Tensor) -> tuple[Any, ...]:
    strides = tuple(stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)
    return tensor.dtype, tuple(tensor.shape), strides


def differ(
    got: Sequence[Any], expected: Sequence[torch.Tensor], names: Sequence[str], by_rounding: Sequence[float] = ()
) -> str:
    """The first tensor that is not what it should be; ``""`` if none.

    Args:
        got: of the program.
        expected: of the function.
        names: what a user would call them.
        by_rounding: how far rounding moves each, beyond what is allowed for one operation of its dtype.

    Raises:
        TooUnsteady: one differs, and rounding moves it so far that this says nothing.
    """
    for index, (mine, right, name) in enumerate(zip(got, expected, names, strict=True)):
        found = difference(right, mine)
        if found is not None and by_rounding:
            found = beyond_rounding(name, right, mine, by_rounding[index])
        if found is not None:
            return f"a replay gave another {name} than the function, {found}"
    return ""


def differ_when_padded(got: Sequence[Any], expected: Sequence[torch.Tensor], names: Sequence[str]) -> str:
    """The same for two sizes of one call."""
    for mine, right, name in zip(got, expected, names, strict=True):
        if departs(mine, right):
            return f"a padded replay gave another {name} than the function at the real size"
    return ""
