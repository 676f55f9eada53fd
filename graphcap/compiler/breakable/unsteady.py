"""How far rounding moves what a recorded call makes: it runs twice more, once with every operator off by a last bit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from graphcap.compiler import private
from graphcap.cudagraph import Constant, Program
from graphcap.cudagraph.checks.rounding import nudge, spread
from graphcap.cudagraph.private import storage_address
from graphcap.cudagraph.recording.recorded import run_live


class _Nudging(TorchDispatchMode):
    """Moves the floats that an operator has made; views share what somebody else made."""

    def __init__(self, given: Collection[int]) -> None:
        """Leave alone the storages at the addresses ``given``."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._given = given

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        aliases = [each.alias_info for each in func._schema.returns]
        if all(alias is None or alias.is_write for alias in aliases):
            nudge(private.tree_flatten(results)[0], self._given)
        return results


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
    given = {storage_address(each) for each in inputs if isinstance(each, torch.Tensor)}

    def left_by_run(mode: AbstractContextManager[Any]) -> list[Any]:
        put_back()
        slots = [*inputs, *(None for step in program.steps for _ in step.writes)]
        with mode:
            run_live(program, slots, 0)
        results = [each.value if isinstance(each, Constant) else slots[each] for each in program.outputs]
        left = [*results, *(inputs[slot] for slot in written)]
        return [each.clone() if isinstance(each, torch.Tensor) else each for each in left]

    return list(map(spread, left_by_run(contextlib.nullcontext()), left_by_run(_Nudging(given))))
