"""The replay of a plan: one flat Python function, generated, with everything known beforehand bound to a name.

Its local variables are the slot table of a call, so that whatever a call brings is dropped when it ends, also on an
exception. The names: ``a3`` argument 3, ``b3`` what captured steps read in its place, ``c7`` what a captured step left
in slot 7, ``v9`` what a live step put into slot 9, ``g0()`` replays segment 0. In a padded plan ``b3`` is what every
step reads for argument 3, ``t3`` the part of it for the real rows, ``n4`` a number of the padded call, and the names
that depend on the real size are bound anew for each (:mod:`~graphcap.cudagraph.padded.fitted`).
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import CodeType, FunctionType
from typing import Any

import torch

from graphcap import native
from graphcap.cudagraph.padded.fitted import Fitter
from graphcap.cudagraph.recording.arena import Arena, overlaps_itself
from graphcap.cudagraph.recording.bindings import Binding
from graphcap.cudagraph.recording.recorded import (
    Recorded,
    inputs_written_back,
    outputs_of,
    run_live,
)
from graphcap.cudagraph.replaying.entry_checks import write_checks
from graphcap.cudagraph.replaying.lines import Lines
from graphcap.cudagraph.replaying.output_lines import read_by, write_expiry, write_outputs


def generate(
    recorded: Recorded,
    at_end: Callable[[], None] | None,
    on_mismatch: Callable[[str], None],
    arena: Arena | None = None,
    fitter: Fitter | None = None,
) -> tuple[Callable[[Sequence[Any]], Any], str]:
    """Write the replay function.

    Args:
        recorded: the capture.
        at_end: called when the outputs have been made, if there is something to call.
        on_mismatch: called with a reason when a live step's result did not fit the graphs that read it. The call itself
            has then gone on live and is right.
        arena: where copied inputs lie, if padded plans have theirs in it, too.
        fitter: of a padded plan.

    Returns:
        The function (of a padded plan that for the size of its rung; the fitter makes the others) and its source.
    """
    writer = _Writer(recorded, on_mismatch, fitter)
    write_checks(writer)
    writer.claim(arena)
    writer.copies_in()
    write_expiry(writer, in_place=True)
    writer.fills()
    first = 0
    for position, entry in enumerate(recorded.timeline):
        if entry < 0:
            writer.line(f"g{~entry}()", **{f"g{~entry}": recorded.segments[~entry].replay})
            later = [each for each in recorded.timeline[position:] if each >= 0]
            stop = later[0] if later else len(recorded.program.steps)
            writer.copies_back(first, stop)
        else:
            writer.live(entry)
            first = entry + 1
    writer.padded_copies_back()
    write_outputs(writer, at_end)
    return writer.finish()


class _Writer(Lines):
    """Writes the lines, part by part."""

    def __init__(self, recorded: Recorded, on_mismatch: Callable[[str], None], fitter: Fitter | None) -> None:
        super().__init__(recorded, fitter)
        self.names["finish"] = _make_finish(recorded, on_mismatch, fitter)
        self._reads_left = Counter(
            slot for entry in recorded.timeline if entry >= 0 for slot in recorded.program.steps[entry].reads
        )
        makers = recorded.outputs.makers
        self._reads_left.update(slot for maker in makers.values() for slot in read_by(maker))
        self._alive: list[int] = []

    def claim(self, arena: Arena | None) -> None:
        """Say that what other plans have put around their real rows is gone, unless this very replay did."""
        copied = self.recorded.layout.inputs_bound(Binding.COPIED, Binding.COPIED_BACK)
        if self.fitter is not None:
            self.line("mine = arena.holder is me", arena=self.fitter.arena)
            self.line("if not mine: arena.holder = None")
        elif arena is not None and copied:
            self.line("arena.holder = None", arena=arena)

    def fills(self) -> None:
        """Write what lies around the real rows: constants when something else has been there, the rest on each call."""
        if self.fitter is not None:
            self.line("if fill_always: fill_always()")
            self.line("if not mine:")
            self.line("    if fill_once: fill_once()")
            self.line("    arena.holder = me")

    def padded_copies_back(self) -> None:
        """What steps wrote into the real rows of padded inputs, for the caller."""
        for index in [] if self.fitter is None else self.fitter.written:
            self.line(f"{self.argument_or_result(index)}.copy_(t{index})")

    def copies_in(self) -> None:
        """One grouped copy for each dtype."""
        groups: dict[torch.dtype, list[int]] = {}
        for index in self.recorded.layout.inputs_bound(Binding.COPIED, Binding.COPIED_BACK, Binding.PADDED):
            stand_in = self.recorded.stand_ins[index]
            if overlaps_itself(stand_in):
                source, target = self.copy_operands(index)
                self.line(f"{target}.copy_({source})")
            elif stand_in.numel():
                groups.setdefault(stand_in.dtype, []).append(index)
        for number, indices in enumerate(groups.values()):
            targets = [self.copy_operands(index)[1] for index in indices]
            self.line(f"copy{number}(args)  # {', '.join(f'a{i}' for i in indices)} into {', '.join(targets)}")
            self.natives[f"copy{number}"] = _copies(targets, indices)

    def copies_back(self, first: int, stop: int) -> None:
        """What a segment wrote into copies, for the caller."""
        for index in inputs_written_back(self.recorded, first, stop):
            source, target = self.copy_operands(index)
            self.line(f"{source}.copy_({target})")

    def live(self, number: int) -> None:
        """Run a live step, check what static memory depends on, fill the bridges."""
        step = self.recorded.program.steps[number]
        self._reads_left.subtract(step.reads)
        if self._is_for_graphs_only(number):
            (slot,) = step.writes
            operands = ", ".join([f"b{slot}", *map(self.value, step.reads)])
            bridge = {f"b{slot}": self.recorded.stand_ins[slot]}
            self.line(f"live{number}({operands})", **{f"live{number}": step.into}, **bridge)
            self._drop_dead()
            return
        call = f"live{number}({', '.join(map(self.value, step.reads))})"
        targets = "".join(f"v{slot}, " for slot in step.writes)
        self.line(f"{targets}= {call}" if targets else call, **{f"live{number}": step.fn})
        self._alive += step.writes
        for slot in step.writes:
            self._fit(number, slot)
        self._drop_dead()

    def _is_for_graphs_only(self, number: int) -> bool:
        """Whether a live step can write its result to where captured steps read it, and nobody else does."""
        step, stand_ins = self.recorded.program.steps[number], self.recorded.stand_ins
        if step.into is None or not set(step.writes) <= stand_ins.keys():
            return False
        bridges = [stand_ins[slot] for slot in step.writes]
        is_writable = all(bridge.numel() and not overlaps_itself(bridge) for bridge in bridges)
        return is_writable and all(self._reads_left[slot] <= 0 for slot in step.writes)

    def _drop_dead(self) -> None:
        dead = [slot for slot in self._alive if self._reads_left[slot] <= 0]
        if dead:
            self.line(f"del {', '.join(f'v{slot}' for slot in dead)}")
            self._alive = [slot for slot in self._alive if slot not in dead]

    def _fit(self, number: int, slot: int) -> None:
        recorded = self.recorded
        leave = f"return finish({number + 1}, args, {{{self._held(number)}}})"
        if slot in recorded.places:
            address, size = recorded.places[slot]
            self.line(
                f"if v{slot}.data_ptr() != PLACE{slot} or v{slot}.shape != SIZE{slot}: {leave}",
                **{f"PLACE{slot}": address, f"SIZE{slot}": size},
            )
        elif slot in recorded.stand_ins:
            bridge = recorded.stand_ins[slot]
            self.line(
                f"if v{slot}.shape != SIZE{slot} or v{slot}.dtype is not DTYPE{slot} "
                f"or v{slot}.stride() != STRIDE{slot}: {leave}",
                **{f"SIZE{slot}": bridge.size(), f"DTYPE{slot}": bridge.dtype, f"STRIDE{slot}": bridge.stride()},
            )
            if bridge.numel():
                source, target = self.copy_operands(slot)
                self.line(f"{target}.copy_({source})")

    def _held(self, number: int) -> str:
        """The items of a dict with what the steps after this live one may read of earlier live ones, by slot: values
        that are there, and copies of bridges where only graphs would have read them."""
        steps, stand_ins = self.recorded.program.steps, self.recorded.stand_ins
        later = {slot for step in steps[number + 1 :] for slot in step.reads}
        earlier = {slot for entry in self.recorded.timeline if 0 <= entry < number for slot in steps[entry].writes}
        bridges = sorted((earlier & later & stand_ins.keys()) - set(self._alive))
        self.names |= {f"b{slot}": stand_ins[slot] for slot in bridges}
        copies = [f"{slot}: b{slot}.clone()" for slot in bridges]
        return ", ".join([f"{slot}: v{slot}" for slot in self._alive] + copies)

    def finish(self) -> tuple[Callable[[Sequence[Any]], Any], str]:
        source, code = _compiled("\n    ".join(self.lines), tuple(self.used), self.recorded.program.name)
        exec(code, self.names)
        replay = self.names.pop("replay")  # not in its own globals: a dropped plan must not wait for the collector
        equip = _equipment(self.natives)
        equip(replay)
        if self.fitter is not None:
            self.fitter.adopt(replay, equip)
        return replay, source


@functools.lru_cache(maxsize=64)
def _compiled(body: str, used: tuple[int, ...], name: str) -> tuple[str, CodeType]:
    """The source of a replay and its code: those of two rungs differ in what the names stand for, hardly ever in
    themselves. ``used``: the arguments that lines of it have asked for."""
    named = set(re.findall(r"\ba(\d+)\b", body))  # some were asked for and then not needed
    prelude = [f"a{index} = args[{index}]" for index in used if str(index) in named]
    source = "\n    ".join(["def replay(args):", *prelude, body]) + "\n"
    return source, compile(source, f"<graphcap replay of {name}>", "exec")


def _copies(targets: Sequence[str], indices: Sequence[int]) -> Callable[[Mapping[str, Any]], Callable[[Any], None]]:
    return lambda names: native.grouped_copy([names[target] for target in targets], indices)


def _equipment(natives: Mapping[str, Callable[[Mapping[str, Any]], Any]]) -> Callable[[FunctionType], None]:
    """What gives a replay its native functions: those in Python now, if there are no others, and the others later."""

    def exchange(replay: FunctionType) -> None:
        names = replay.__globals__
        names.update({name: make(names) for name, make in natives.items()})

    def equip(replay: FunctionType) -> None:
        status = native.status()  # first: the extension may come while the functions are made
        exchange(replay)
        if status != "extension":
            native.when_ready(replay, exchange)

    return equip


def _make_finish(
    recorded: Recorded, on_mismatch: Callable[[str], None], fitter: Fitter | None
) -> Callable[[int, Sequence[Any], dict[int, Any]], tuple[Any, ...]]:
    """How to complete a call whose live result does not fit: the steps that are left run live."""

    def finish(start: int, args: Sequence[Any], values: dict[int, Any]) -> tuple[Any, ...]:
        slots: list[Any] = [*args, *[None] * (len(recorded.seen.roots) - len(args))]
        for slot, value in (*recorded.constants.items(), *values.items()):
            slots[slot] = value
        if fitter is not None:
            for index in recorded.layout.inputs_bound(Binding.PADDED):
                slots[index] = recorded.stand_ins[index]
            for index, value in fitter.scalars.items():
                slots[index] = value
        run_live(recorded.program, slots, start)
        on_mismatch(f"{recorded.program.steps[start - 1].name} gave a result of another size or place than at capture")
        outputs = outputs_of(recorded, slots, start).collect(slots)
        return outputs if fitter is None else fitter.padding.hand_back(args, slots, outputs, recorded.seen)

    return finish
