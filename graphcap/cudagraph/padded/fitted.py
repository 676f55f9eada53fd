"""A padded plan made for one real size: the same code, with the names that depend on the size bound anew.

A plan of a rung serves every smaller size. What differs between two of them is how much is copied in, what is filled
around it, and how much of the outputs is handed back: tensors and sizes that the generated replay finds in its globals.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch

from graphcap.cudagraph.checks.around import COPIES
from graphcap.cudagraph.padded.corner import around, corner, fill_around
from graphcap.cudagraph.padded.padding import Padding
from graphcap.cudagraph.recording.arena import Arena
from graphcap.cudagraph.recording.bindings import Binding
from graphcap.cudagraph.recording.recorded import Recorded, padded_inputs_written
from graphcap.cudagraph.replaying.outputs import Clone

_MAX_FITS = 1024  #: kept for each plan


class Fitter:
    """The replays of one padded plan, by real size.

    Attributes:
        padding: of the program.
        rung: the symbols that are padded in the plan, each with its size there.
        scalars: the scalar inputs that follow one of them, each with its value in the plan.
        arena: where the padded inputs lie, which the plans of a runner share.
        written: the padded inputs that a step writes into.
    """

    def __init__(self, padding: Padding, rung: Mapping[str, int], recorded: Recorded, arena: Arena) -> None:
        self.padding = padding
        self.rung = dict(rung)
        followed = padding.scalars.items()
        self.scalars = {index: size.at(rung[size.symbol]) for index, size in followed if size.symbol in rung}
        self.arena = arena
        self.written = padded_inputs_written(recorded)
        self._recorded = recorded
        self._inputs = recorded.layout.inputs_bound(Binding.PADDED)
        self._outputs = {
            slot for slot in recorded.program.outputs if isinstance(slot, int) and padding.follows(slot, rung)
        }
        self._replay: FunctionType | None = None
        self._on_made: Callable[[FunctionType], None] = lambda replay: None
        self._fits: dict[tuple[int, ...], FunctionType] = {}
        self._made: weakref.WeakSet[FunctionType] = (
            weakref.WeakSet()
        )  # a way to a plan may keep more than are kept here

    def adopt(self, replay: FunctionType, on_made: Callable[[FunctionType], None]) -> None:
        """Take over the replay for the rung itself; ``on_made`` is told of each other one."""
        self._replay, self._on_made = replay, on_made
        replay.__globals__[COPIES] = self._made

    def fit(self, real: Mapping[str, int]) -> Callable[[Sequence[Any]], Any]:
        """The replay for these sizes, by symbol; symbols that are left out have the size of the rung."""
        assert self._replay is not None
        sizes = {symbol: real.get(symbol, size) for symbol, size in self.rung.items()}
        if sizes == self.rung:
            return self._replay
        key = tuple(sizes.values())
        found = self._fits.get(key)
        if found is None:
            if len(self._fits) >= _MAX_FITS:
                self._fits.clear()
            found = self._fits[key] = self._made_for(sizes)
        return found

    def names(self, sizes: Mapping[str, int]) -> dict[str, Any]:
        """What the replay for these sizes finds under the names that depend on them."""
        recorded, names = self._recorded, dict[str, Any]()
        once: list[Callable[[], Any]] = []
        always: list[Callable[[], Any]] = []
        for index in self._inputs:
            buffer = recorded.stand_ins[index]
            part = names[f"t{index}"] = corner(buffer, self.padding.size_of_input(index, sizes))
            size = names[f"SIZE{index}"] = part.shape
            if buffer.shape != size:
                fill = self.padding.fill(index)
                lasts = isinstance(fill, (bool, int, float)) and index not in self.written
                (once if lasts else always).append(_filler(buffer, size, fill))
        for output, slot in zip(recorded.program.outputs, recorded.outputs.order, strict=True):
            if output in self._outputs and isinstance(slot, int) and slot >= len(recorded.program.inputs):
                cut_to = names[f"CUT{slot}"] = self.padding.size_of_output(output, sizes)
                maker = recorded.outputs.makers[slot]
                if isinstance(maker, Clone) and maker.part is None:
                    names[f"block{maker.block}"] = corner(recorded.outputs.blocks[maker.block], cut_to)
        outputs = recorded.outputs
        if outputs.hand_out is not None and outputs.blocks:
            blocks = [names.get(f"block{number}", block) for number, block in enumerate(outputs.blocks)]
            names["hand_out"] = outputs.hand_out.over(blocks)
        return names | {"me": object(), "fill_once": _all(once), "fill_always": _all(always)}

    def _made_for(self, sizes: Mapping[str, int]) -> FunctionType:
        assert self._replay is not None
        replay = FunctionType(self._replay.__code__, {**self._replay.__globals__, **self.names(sizes)}, "replay")
        self._made.add(replay)
        self._on_made(replay)
        return replay


def _filler(buffer: torch.Tensor, size: torch.Size, fill: Any) -> Callable[[], Any]:
    if not isinstance(fill, (bool, int, float)):
        return lambda: fill_around(buffer, size, fill)
    places = [rest for _, rest in around(buffer, size)]

    def write() -> None:
        for place in places:
            place.fill_(fill)

    return write


def _all(calls: list[Callable[[], Any]]) -> Callable[[], None] | None:
    if not calls:
        return None

    def call_all() -> None:
        for call in calls:
            call()

    return call_all
