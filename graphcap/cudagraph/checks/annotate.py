"""The names of pieces in a trace: around every graph launch and every live step, for torch.profiler and NVTX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from graphcap.cudagraph.checks.around import put_around
from graphcap.cudagraph.checks.rehearsal import segments_of
from graphcap.cudagraph.recording.recorded import Recorded


def annotate(replay: Callable[..., Any], recorded: Recorded, on_cuda: bool) -> None:
    """Name what a replay does: ``"forward_0: piece_0 to piece_56"`` for a graph, ``"forward_0: piece_1"`` for a live
    step."""
    program = recorded.program
    groups = segments_of(recorded)

    def segment(number: int, launch: Callable[..., Any]) -> Callable[..., Any]:
        names = [program.steps[each].name for each in groups[number]]
        span = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
        return _named(f"{program.name}: {span}", launch, on_cuda)

    def live(number: int, call: Callable[..., Any]) -> Callable[..., Any]:
        return _named(f"{program.name}: {program.steps[number].name}", call, on_cuda)

    put_around(replay, recorded, segment=segment, live=live)


def _named(name: str, call: Callable[..., Any], on_cuda: bool) -> Callable[..., Any]:
    def named(*args: Any) -> Any:
        if on_cuda:
            torch.cuda.nvtx.range_push(name)
        try:
            with torch.profiler.record_function(name):
                return call(*args)
        finally:
            if on_cuda:
                torch.cuda.nvtx.range_pop()

    return named
