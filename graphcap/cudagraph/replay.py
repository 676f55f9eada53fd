"""The replay of a plan: one flat Python function, generated, with everything known beforehand bound to a name.

Its local variables are the slot table of a call, so that whatever a call brings is dropped when it ends, also on an
exception. The names: ``a3`` argument 3, ``b3`` what captured steps read in its place, ``c7`` what a captured step left
in slot 7, ``v9`` what a live step put into slot 9, ``g0()`` replays segment 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch

from graphcap import native
from graphcap.cudagraph.arena import flat, overlaps_itself
from graphcap.cudagraph.bindings import Binding, MemoryFacts
from graphcap.cudagraph.outputs import AsIs, Clone, Rehomed, View
from graphcap.cudagraph.plan import Unfit, static_addresses
from graphcap.cudagraph.private import storage_address
from graphcap.cudagraph.program import Constant, InputKind
from graphcap.cudagraph.recorded import Recorded, inputs_written_back, outputs_of, run_live


def generate(
    recorded: Recorded, at_end: Callable[[], None] | None, on_mismatch: Callable[[str], None]
) -> tuple[Callable[[tuple[Any, ...]], Any], str]:
    """Write the replay function.

    Args:
        recorded: the capture.
        at_end: called when the outputs have been made, if there is something to call.
        on_mismatch: called with a reason when a live step's result did not fit the graphs that read it. The call itself
            has then gone on live and is right.

    Returns:
        The function and its source.
    """
    writer = _Writer(recorded, on_mismatch)
    writer.checks()
    writer.copies_in()
    writer.expire(in_place=True)
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
    writer.outputs(at_end)
    return writer.finish()


class _Writer:
    """Collects the lines of one function and the names they use."""

    def __init__(self, recorded: Recorded, on_mismatch: Callable[[str], None]) -> None:
        self._recorded = recorded
        self._lines: list[str] = []
        self._used: dict[int, None] = {}  # arguments that need a local variable
        self._names: dict[str, Any] = {
            "copy_many": torch._foreach_copy_,
            "flat": flat,
            "finish": _make_finish(recorded, on_mismatch),
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

    def line(self, text: str, **names: Any) -> None:
        self._lines.append(text)
        self._names |= names

    def value(self, slot: int) -> str:
        """The name under which live code finds a slot."""
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
            if index not in static or self._recorded.program.inputs[index].kind is InputKind.TENSOR:
                name = self.value(index)
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
        copied = layout.inputs_bound(Binding.COPIED) if places else []
        for index in copied:
            self.line(f"if {_storage(self.value(index))} in WRITTEN: return CHANGED", WRITTEN=places)
        for index in layout.inputs_bound(Binding.COPIED_BACK):
            others = [other for other, root in enumerate(roots[: len(layout.bindings)]) if root >= 0 and other != index]
            if others:
                storages = ", ".join(_storage(self.value(other)) for other in others)
                self.line(f"if ({_storage(self.value(index))} or None) in ({storages},): return CHANGED")

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

    def copies_in(self) -> None:
        """One grouped copy for each dtype."""
        groups: dict[torch.dtype, list[tuple[str, str]]] = {}
        for index in self._recorded.layout.inputs_bound(Binding.COPIED, Binding.COPIED_BACK):
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
        stand_in, name = self._recorded.stand_ins[slot], self.value(slot)
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
        made: dict[int, str] = {}
        for slot, maker in plan.makers.items():
            if isinstance(maker, AsIs):
                made[slot] = self.value(maker.slot)
            elif isinstance(maker, View):
                made[slot] = f"o{slot}"
                self.line(f"o{slot} = view{slot}({self.value(maker.base)})", **{f"view{slot}": maker.make})
            elif isinstance(maker, Rehomed):
                made[slot] = f"o{slot}"
                owner = self.value(maker.base)
                self.line(f"o{slot} = rehome{slot}(v{slot}, {owner})", **{f"rehome{slot}": maker.make})
            elif maker.part is None:
                made[slot] = f"k{maker.block}"
            else:
                made[slot] = f"o{slot}"
                self.line(f"o{slot} = part{slot}(k{maker.block})", **{f"part{slot}": maker.part})
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

    def finish(self) -> tuple[Callable[[tuple[Any, ...]], Any], str]:
        prelude = [f"a{index} = args[{index}]" for index in self._used]
        source = "\n    ".join(["def replay(args):", *prelude, *self._lines]) + "\n"
        exec(compile(source, f"<graphcap replay of {self._recorded.program.name}>", "exec"), self._names)
        replay = self._names.pop("replay")  # not in its own globals: a dropped plan must not wait for the collector
        if self._places is not None:
            native.when_ready(replay, _check_natively(*self._places))
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
    recorded: Recorded, on_mismatch: Callable[[str], None]
) -> Callable[[int, Sequence[Any], dict[int, Any]], tuple[Any, ...]]:
    """How to complete a call whose live result does not fit: the steps that are left run live."""

    def finish(start: int, args: Sequence[Any], values: dict[int, Any]) -> tuple[Any, ...]:
        slots: list[Any] = [*args, *[None] * (len(recorded.seen.roots) - len(args))]
        for slot, value in (*recorded.constants.items(), *values.items()):
            slots[slot] = value
        run_live(recorded.program, slots, start)
        on_mismatch(f"{recorded.program.steps[start - 1].name} gave a result of another size or place than at capture")
        return outputs_of(recorded, slots, start).collect(slots)

    return finish
