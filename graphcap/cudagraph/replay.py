"""The replay of a plan: one flat Python function, generated, with everything known beforehand bound to a name.

Its local variables are the slot table of a call, so that whatever a call brings is dropped when it ends, also on an
exception. The names: ``a3`` argument 3, ``b3`` what captured steps read in its place, ``c7`` what a captured step left
in slot 7, ``v9`` what a live step put into slot 9, ``g0()`` replays segment 0. In a padded plan ``b3`` is what every
step reads for argument 3, ``t3`` the part of it for the real rows, ``n4`` a number of the padded call, and the names
that depend on the real size are bound anew for each (:mod:`~graphcap.cudagraph.fitted`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch

from graphcap import native
from graphcap.cudagraph.arena import Arena, flat, overlaps_itself
from graphcap.cudagraph.bindings import Binding, MemoryFacts
from graphcap.cudagraph.corner import cut
from graphcap.cudagraph.fitted import Fitter
from graphcap.cudagraph.outputs import AsIs, Clone, Rehomed, View
from graphcap.cudagraph.plan import Unfit, static_addresses
from graphcap.cudagraph.private import storage_address
from graphcap.cudagraph.program import Constant, InputKind
from graphcap.cudagraph.recorded import (
    Recorded,
    inputs_written_back,
    outputs_of,
    padded_inputs_written,
    run_live,
)


def generate(
    recorded: Recorded,
    at_end: Callable[[], None] | None,
    on_mismatch: Callable[[str], None],
    arena: Arena | None = None,
    fitter: Fitter | None = None,
) -> tuple[Callable[[tuple[Any, ...]], Any], str]:
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
    writer.checks()
    writer.claim(arena)
    writer.copies_in()
    writer.expire(in_place=True)
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
    writer.outputs(at_end)
    return writer.finish()


class _Writer:
    """Collects the lines of one function and the names they use."""

    def __init__(self, recorded: Recorded, on_mismatch: Callable[[str], None], fitter: Fitter | None) -> None:
        self._recorded = recorded
        self._fitter = fitter
        self._padded = recorded.layout.inputs_bound(Binding.PADDED)
        self._lines: list[str] = []
        self._used: dict[int, None] = {}  # arguments that need a local variable
        self._names: dict[str, Any] = {
            "copy_many": torch._foreach_copy_,
            "flat": flat,
            "finish": _make_finish(recorded, on_mismatch, fitter),
            "cut": cut,
            "MOVED": Unfit.MOVED,
            "CHANGED": Unfit.CHANGED,
        }
        self._reads_left = Counter(
            slot for entry in recorded.timeline if entry >= 0 for slot in recorded.program.steps[entry].reads
        )
        makers = recorded.outputs.makers
        self._reads_left.update(slot for maker in makers.values() for slot in _read_by(maker))
        self._alive: list[int] = []
        self._places: tuple[list[int], list[int]] | None = None
        if fitter is not None:
            self._names |= fitter.names(fitter.rung)

    def line(self, text: str, **names: Any) -> None:
        self._lines.append(text)
        self._names |= names

    def value(self, slot: int) -> str:
        """The name under which live code finds a slot."""
        if slot in self._padded:
            self._names[f"b{slot}"] = self._recorded.stand_ins[slot]
            return f"b{slot}"
        if self._fitter is not None and slot in self._fitter.scalars:
            self._names[f"n{slot}"] = self._fitter.scalars[slot]
            return f"n{slot}"
        return self.argument_or_result(slot)

    def argument_or_result(self, slot: int) -> str:
        """The name of what the caller gave, or of what a step left."""
        if slot < len(self._recorded.program.inputs):
            self._used[slot] = None
            return f"a{slot}"
        if slot in self._recorded.constants:
            self._names[f"c{slot}"] = self._recorded.constants[slot]
            return f"c{slot}"
        return f"v{slot}"

    def checks(self) -> None:
        """Addresses of what is used in place; layouts of what may change between calls."""
        addresses = static_addresses(self._recorded)
        static = [index for index, address in enumerate(addresses) if address is not None]
        if static:
            self._places = static, [address for address in addresses if address is not None]
            self.line("if not addresses_hold(args): return MOVED", addresses_hold=native.address_check(*self._places))
        for index, stand_in in self._recorded.stand_ins.items():
            if index >= len(self._recorded.program.inputs):
                continue
            name = self.argument_or_result(index)
            if index in self._padded:  # copied row by row, so that its strides do not matter
                self.line(
                    f"if {name}.shape != SIZE{index} or {name}.dtype is not DTYPE{index} or {name}.device != DEVICE: "
                    "return CHANGED",
                    DEVICE=stand_in.device,
                    **{f"DTYPE{index}": stand_in.dtype},
                )
            elif index not in static or self._recorded.program.inputs[index].kind is InputKind.TENSOR:
                self.line(
                    f"if {name}.shape != SIZE{index} or {name}.dtype is not DTYPE{index} "
                    f"or {name}.stride() != STRIDE{index} or {name}.device != DEVICE: return CHANGED",
                    DEVICE=stand_in.device,
                    **{f"SIZE{index}": stand_in.size(), f"DTYPE{index}": stand_in.dtype},
                    **{f"STRIDE{index}": stand_in.stride()},
                )
        self._alias_checks()
        self._relation_checks()
        self._lent_checks()

    def _alias_checks(self) -> None:
        """A copy must not hide from a captured step what another step writes into the original."""
        recorded, layout = self._recorded, self._recorded.layout
        facts = MemoryFacts(recorded.program, recorded.seen)
        roots = recorded.seen.roots
        written = [index for index in layout.inputs_bound(Binding.STATIC) if roots[index] in facts.mutated]
        places = {storage_address(recorded.stand_ins[index]) for index in written} - {0}
        written_copies = padded_inputs_written(recorded)
        copied = layout.inputs_bound(Binding.COPIED, Binding.PADDED) if places else []
        for index in copied:
            name = self.argument_or_result(index)
            self.line(f"if {_storage(name)} in WRITTEN: return CHANGED", WRITTEN=places)
        elsewhere = {i for i, root in enumerate(roots[: len(layout.bindings)]) if root in facts.mutated} - {*written}
        for index in self._padded:
            if others := sorted(elsewhere - {*self._padded}):
                storages = ", ".join(_storage(self.argument_or_result(other)) for other in others)
                name = self.argument_or_result(index)
                self.line(f"if ({_storage(name)} or None) in ({storages},): return CHANGED")
        for index in (*layout.inputs_bound(Binding.COPIED_BACK), *written_copies):
            others = [other for other, root in enumerate(roots[: len(layout.bindings)]) if root >= 0 and other != index]
            if others:
                storages = ", ".join(_storage(self.argument_or_result(other)) for other in others)
                name = self.argument_or_result(index)
                self.line(f"if ({_storage(name)} or None) in ({storages},): return CHANGED")

    def _relation_checks(self) -> None:
        """Arguments that shared memory at capture must share it in the same way: which of them a result is or views was
        learned from that call."""
        static = self._recorded.layout.inputs_bound(Binding.STATIC)
        _, shared, same = self._recorded.seen.signature
        for index, first in same:
            self.line(f"if {self.value(index)} is not {self.value(first)}: return CHANGED")
        for index, root, distance in shared:
            if index not in static or root not in static:
                one, other = self.value(index), self.value(root)
                self.line(
                    f"if {one}.data_ptr() - {other}.data_ptr() != {distance} "
                    f"or {_storage(one)} != {_storage(other)}: return CHANGED"
                )

    def _lent_checks(self) -> None:
        """An argument that lies in the plan's own outputs is overwritten while the plan runs: only what is copied in
        before that may be one."""
        recorded, layout = self._recorded, self._recorded.layout
        lent = recorded.outputs.lent()
        if not lent:
            return
        read_live = {slot for number in layout.live for slot in recorded.program.steps[number].reads}
        late = read_live & {*layout.inputs_bound(Binding.COPIED, Binding.REFERENCE)}
        for index in sorted(late.union(layout.inputs_bound(Binding.COPIED_BACK))):
            name = self.value(index)
            place = f"place_of({name})" if index in recorded.seen.foreign else _storage(name)
            self.line(f"if {place} in LENT: return CHANGED", LENT=lent, place_of=storage_address)

    def expire(self, in_place: bool) -> None:
        """Say that outputs of earlier calls end here, where that is checked."""
        plan = self._recorded.outputs
        if plan.generations is not None and plan.in_place == in_place:
            self.line("expire()", expire=plan.generations.expire)

    def claim(self, arena: Arena | None) -> None:
        """Say that what other plans have put around their real rows is gone, unless this very replay did."""
        copied = self._recorded.layout.inputs_bound(Binding.COPIED, Binding.COPIED_BACK)
        if self._fitter is not None:
            self.line("mine = arena.holder is me", arena=self._fitter.arena)
            self.line("if not mine: arena.holder = None")
        elif arena is not None and copied:
            self.line("arena.holder = None", arena=arena)

    def fills(self) -> None:
        """Write what lies around the real rows: constants when something else has been there, the rest on each call."""
        if self._fitter is not None:
            self.line("fill_always()")
            self.line("if not mine:")
            self.line("    fill_once()")
            self.line("    arena.holder = me")

    def padded_copies_back(self) -> None:
        """What steps wrote into the real rows of padded inputs, for the caller."""
        for index in [] if self._fitter is None else self._fitter.written:
            self.line(f"{self.argument_or_result(index)}.copy_(t{index})")

    def copies_in(self) -> None:
        """One grouped copy for each dtype."""
        groups: dict[torch.dtype, list[tuple[str, str]]] = {}
        for index in self._recorded.layout.inputs_bound(Binding.COPIED, Binding.COPIED_BACK, Binding.PADDED):
            stand_in = self._recorded.stand_ins[index]
            if stand_in.numel() == 0:
                continue
            source, target = self._copy_operands(index)
            groups.setdefault(stand_in.dtype, []).append((target, source))
        for pairs in groups.values():
            if len(pairs) == 1:
                self.line(f"{pairs[0][0]}.copy_({pairs[0][1]})")
            else:
                targets, sources = (", ".join(names) for names in zip(*pairs, strict=True))
                self.line(f"copy_many([{targets}], [{sources}])")

    def _copy_operands(self, slot: int) -> tuple[str, str]:
        stand_in, name = self._recorded.stand_ins[slot], self.argument_or_result(slot)
        if slot in self._padded:
            return name, f"t{slot}"
        overlaps = overlaps_itself(stand_in)
        self._names[f"b{slot}"] = flat(stand_in) if overlaps else stand_in
        return (f"flat({name})" if overlaps else name), f"b{slot}"

    def copies_back(self, first: int, stop: int) -> None:
        """What a segment wrote into copies, for the caller."""
        for index in inputs_written_back(self._recorded, first, stop):
            source, target = self._copy_operands(index)
            self.line(f"{source}.copy_({target})")

    def live(self, number: int) -> None:
        """Run a live step, check what static memory depends on, fill the bridges."""
        step = self._recorded.program.steps[number]
        call = f"live{number}({', '.join(map(self.value, step.reads))})"
        targets = "".join(f"v{slot}, " for slot in step.writes)
        self.line(f"{targets}= {call}" if targets else call, **{f"live{number}": step.fn})
        self._alive += step.writes
        self._reads_left.subtract(step.reads)
        for slot in step.writes:
            self._fit(number, slot)
        dead = [slot for slot in self._alive if self._reads_left[slot] <= 0]
        if dead:
            self.line(f"del {', '.join(f'v{slot}' for slot in dead)}")
            self._alive = [slot for slot in self._alive if slot not in dead]

    def _fit(self, number: int, slot: int) -> None:
        recorded = self._recorded
        held = ", ".join(f"{each}: v{each}" for each in self._alive)
        leave = f"return finish({number + 1}, args, {{{held}}})"
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
                source, target = self._copy_operands(slot)
                self.line(f"{target}.copy_({source})")

    def outputs(self, at_end: Callable[[], None] | None) -> None:
        """Hand out what lies in static memory, hand back what is the caller's."""
        plan = self._recorded.outputs
        self._blocks()
        made = {slot: self._output(slot, maker) for slot, maker in plan.makers.items()}
        if plan.generations is not None:
            lent = "".join(f"{made[slot]}, " for slot, maker in plan.makers.items() if isinstance(maker, Clone))
            self.line(f"handed_out(({lent}))", handed_out=plan.generations.hand_out)
        if at_end is not None:
            self.line("at_end()", at_end=at_end)
        listed = []
        for position, each in enumerate(plan.order):
            if isinstance(each, Constant):
                self._names[f"constant{position}"] = each.value
                listed.append(f"constant{position}")
            else:
                listed.append(made[each])
        self.line(f"return ({', '.join(listed)}{',' if len(listed) == 1 else ''})")

    def _blocks(self) -> None:
        """Copy static memory, or hand it out in another way."""
        plan = self._recorded.outputs
        if plan.hand_out is None:
            for index, block in enumerate(plan.blocks):
                self.line(f"k{index} = block{index}.clone()", **{f"block{index}": block})
        elif plan.blocks:
            self.expire(in_place=False)
            targets = "".join(f"k{index}, " for index in range(len(plan.blocks)))
            self.line(f"{targets}= hand_out()", hand_out=plan.hand_out.over(plan.blocks))

    def _output(self, slot: int, maker: Any) -> str:
        """Make one output; the name under which it is found."""
        if isinstance(maker, AsIs):
            name = self.argument_or_result(maker.slot)
        elif isinstance(maker, Clone) and maker.part is None:
            return f"k{maker.block}"
        else:
            name = f"o{slot}"
            if isinstance(maker, View):
                self.line(f"{name} = view{slot}({self.value(maker.base)})", **{f"view{slot}": maker.make})
            elif isinstance(maker, Rehomed):
                owner = self.value(maker.base)
                self.line(f"{name} = rehome{slot}(v{slot}, {owner})", **{f"rehome{slot}": maker.make})
            else:
                self.line(f"{name} = part{slot}(k{maker.block})", **{f"part{slot}": maker.part})
        if f"CUT{slot}" in self._names:
            self.line(f"o{slot} = cut({name}, CUT{slot})")
            return f"o{slot}"
        return name

    def finish(self) -> tuple[Callable[[tuple[Any, ...]], Any], str]:
        named = set(re.findall(r"\ba(\d+)\b", "\n".join(self._lines)))  # some were asked for and then not needed
        prelude = [f"a{index} = args[{index}]" for index in self._used if str(index) in named]
        source = "\n    ".join(["def replay(args):", *prelude, *self._lines]) + "\n"
        exec(compile(source, f"<graphcap replay of {self._recorded.program.name}>", "exec"), self._names)
        replay = self._names.pop("replay")  # not in its own globals: a dropped plan must not wait for the collector
        places = self._places

        def check_natively(replay: FunctionType) -> None:
            if places is not None:
                native.when_ready(replay, _check_natively(*places))

        check_natively(replay)
        if self._fitter is not None:
            self._fitter.adopt(replay, check_natively)
        return replay, source


def _check_natively(static: list[int], addresses: list[int]) -> Callable[[FunctionType], None]:
    def exchange(replay: FunctionType) -> None:
        replay.__globals__["addresses_hold"] = native.address_check(static, addresses)

    return exchange


def _read_by(maker: Any) -> tuple[int, ...]:
    """The slots that an output is made of when the steps are done."""
    if isinstance(maker, AsIs):
        return (maker.slot,)
    if isinstance(maker, View):
        return (maker.base,)
    return (maker.slot, maker.base) if isinstance(maker, Rehomed) else ()


def _storage(name: str) -> str:
    return f"{name}.untyped_storage().data_ptr()"


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
