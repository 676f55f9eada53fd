"""The lines of a generated replay that make its outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from graphcap.cudagraph.padded.corner import cut
from graphcap.cudagraph.program import Constant
from graphcap.cudagraph.replaying.lines import Lines
from graphcap.cudagraph.replaying.outputs import AsIs, Clone, Rehomed, View


def write_outputs(lines: Lines, at_end: Callable[[], None] | None) -> None:
    """Hand out what lies in static memory, hand back what is the caller's."""
    plan = lines.recorded.outputs
    _blocks(lines)
    made = {slot: _output(lines, slot, maker) for slot, maker in plan.makers.items()}
    if plan.generations is not None:
        lent = "".join(f"{made[slot]}, " for slot, maker in plan.makers.items() if isinstance(maker, Clone))
        lines.line(f"handed_out(({lent}))", handed_out=plan.generations.hand_out)
    if at_end is not None:
        lines.line("at_end()", at_end=at_end)
    listed = []
    for position, each in enumerate(plan.order):
        if isinstance(each, Constant):
            lines.names[f"constant{position}"] = each.value
            listed.append(f"constant{position}")
        else:
            listed.append(made[each])
    lines.line(f"return ({', '.join(listed)}{',' if len(listed) == 1 else ''})")


def write_expiry(lines: Lines, in_place: bool) -> None:
    """Say that outputs of earlier calls end here, where that is checked."""
    plan = lines.recorded.outputs
    if plan.generations is not None and plan.in_place == in_place:
        lines.line("expire()", expire=plan.generations.expire)


def read_by(maker: Any) -> tuple[int, ...]:
    """The slots that an output is made of when the steps are done."""
    if isinstance(maker, AsIs):
        return (maker.slot,)
    if isinstance(maker, View):
        return (maker.base,)
    return (maker.slot, maker.base, *maker.before) if isinstance(maker, Rehomed) else ()


def _blocks(lines: Lines) -> None:
    """Copy static memory, or hand it out in another way."""
    plan = lines.recorded.outputs
    if plan.hand_out is None:
        for index, block in enumerate(plan.blocks):
            lines.line(f"k{index} = block{index}.clone()", **{f"block{index}": block})
    elif plan.blocks:
        write_expiry(lines, in_place=False)
        targets = "".join(f"k{index}, " for index in range(len(plan.blocks)))
        lines.line(f"{targets}= hand_out()", hand_out=plan.hand_out.over(plan.blocks))


def _output(lines: Lines, slot: int, maker: Any) -> str:
    """Make one output; the name under which it is found."""
    if isinstance(maker, AsIs):
        name = lines.argument_or_result(maker.slot)
    elif isinstance(maker, Clone) and maker.part is None:
        return f"k{maker.block}"
    else:
        name = f"o{slot}"
        if isinstance(maker, View):
            lines.line(f"{name} = view{slot}({lines.value(maker.base)})", **{f"view{slot}": maker.make})
        elif isinstance(maker, Rehomed):
            owner = lines.value(maker.base)
            twins = [] if f"CUT{slot}" in lines.names else maker.before
            twin = "".join(f"o{each} if v{slot} is v{each} else " for each in twins)
            lines.line(f"{name} = {twin}rehome{slot}(v{slot}, {owner})", **{f"rehome{slot}": maker.make})
        else:
            lines.line(f"{name} = part{slot}(k{maker.block})", **{f"part{slot}": maker.part})
    if f"CUT{slot}" in lines.names:
        lines.line(f"o{slot} = cut({name}, CUT{slot})", cut=cut)
        return f"o{slot}"
    return name
