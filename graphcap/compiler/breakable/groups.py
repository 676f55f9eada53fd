"""Which calls become one step: neighbours that a graph can hold do, everything else is a step of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

from graphcap.compiler import private
from graphcap.compiler.breakable.calls import Call, Ref
from graphcap.compiler.breakable.record import Recorder
from graphcap.compiler.rules import SplitRules, op_name
from graphcap.cudagraph import Capture


@dataclass
class Group:
    """Neighbouring calls that become one step."""

    calls: list[Call]
    capture: Capture
    reason: str = ""
    views: list[tuple[int, int]] = field(default_factory=list)  # new value, and the value that it views

    @property
    def moves_on(self) -> bool:
        """See :class:`~graphcap.compiler.breakable.calls.Call`."""
        return any(call.moves_on for call in self.calls)


def fold_numbers(recording: Recorder) -> dict[int, torch.Tensor]:
    """The values made of Python numbers, those that were moved to another device or dtype included."""
    written = {storage for call in recording.calls for storage in call.written}
    found = {n: v.numbers for n, v in enumerate(recording.values) if v.numbers is not None}
    for call in recording.calls:
        reads = call.reads()
        if op_name(call.function) == "aten::_to_copy" and len(reads) == 1 and reads[0] in found:
            number = call.results[0]
            if recording.values[reads[0]].storage not in written and number is not None:
                leaves = [found[leaf.value] if isinstance(leaf, Ref) else leaf for leaf in call.leaves]
                args, kwargs = private.tree_unflatten(leaves, call.spec)
                with torch.inference_mode(False), torch.no_grad():
                    found[number] = call.function(*args, **kwargs)
    return found


def group_calls(
    recording: Recorder, numbers: dict[int, torch.Tensor], home: torch.device, rules: SplitRules
) -> list[Group]:
    """The steps, in order.

    Args:
        recording: the calls.
        numbers: what :func:`fold_numbers` found.
        home: where graphs are captured; a call that touches another device is live.
        rules: which operators are cut out of their neighbours.
    """
    groups: list[Group] = []
    used = {number for call in recording.calls for number in call.reads()} | {number for number, _ in recording.outputs}
    for call in _with_numbers(recording, numbers):
        live = call.live or _elsewhere(recording, call, home, numbers, used)
        split = rules.match_name(call.function)
        if live:
            groups.append(Group([call], Capture.NEVER, f"{live} ({call.origin})"))
        elif split is not None:
            groups.append(Group([call], Capture.FULL, split))
        elif groups and groups[-1].capture is Capture.ALWAYS:
            groups[-1].calls.append(call)
        else:
            groups.append(Group([call], Capture.ALWAYS))
    return _fold_views(recording, groups)


def _fold_views(recording: Recorder, groups: list[Group]) -> list[Group]:
    """A captured group that only makes views launches nothing: it joins the cut operator beside it."""
    folded: list[Group] = []
    for group in groups:
        before = folded[-1] if folded else None
        if before is not None and _may_join(recording, group, before):
            before.calls += group.calls
        elif before is not None and _may_join(recording, before, group):
            folded[-1] = Group([*before.calls, *group.calls], group.capture, group.reason)
        else:
            folded.append(group)
    return folded


def _may_join(recording: Recorder, views: Group, cut: Group) -> bool:
    only_views = all(_is_view(recording, call) for call in views.calls)
    return views.capture is Capture.ALWAYS and cut.capture is Capture.FULL and only_views


def _is_view(recording: Recorder, call: Call) -> bool:
    """Whether everything that a call makes shares memory with what it reads, and it writes nothing."""
    read = {recording.values[number].storage for number in call.reads()}
    made = {recording.values[number].storage for number in call.results if number is not None}
    return not call.written and bool(made) and made <= read


def _with_numbers(recording: Recorder, numbers: dict[int, torch.Tensor]) -> Iterator[Call]:
    """The calls, and before the first use of each tensor made of Python numbers one that copies it."""
    made: set[int] = set()

    def make(wanted: Iterable[int]) -> Iterator[Call]:
        for number in wanted:
            if number in numbers and number not in made:
                made.add(number)
                leaves, spec = private.tree_flatten(((numbers[number],), {}))
                origin = recording.values[number].origin
                yield Call(torch.ops.aten.clone.default, tuple(leaves), spec, (number,), frozenset(), "", origin)

    for call in recording.calls:
        if not any(number in numbers for number in call.results):
            yield from make(call.reads())
            yield call
    yield from make(number for number, _ in recording.outputs)


def _elsewhere(
    recording: Recorder, call: Call, home: torch.device, numbers: dict[int, torch.Tensor], used: set[int]
) -> str:
    """Why a call is live for the devices that it touches.

    A number on the CPU is one that the kernel is given. A result on the CPU that nobody reads does not count: attention
    kernels return the state of a generator.
    """
    for number in (*call.reads(), *call.results):
        if number is not None and number in used and (device := recording.values[number].layout[3]) != home:
            if number in numbers and not recording.values[number].layout[0]:
                continue
            return f"{op_name(call.function)} touches a tensor on {device}"
    return ""


def returned_values(recording: Recorder, groups: list[Group]) -> list[int]:
    """The values to return. A result that views an argument or another result is made by a line of its own."""
    views: dict[tuple[int, int], int] = {}
    for which in recording.outputs:
        if which[1]:
            views.setdefault(which, len(recording.values) + len(views))
    if views:
        if not groups or groups[-1].capture is not Capture.ALWAYS:
            groups.append(Group([], Capture.ALWAYS))
        groups[-1].views = [(new, number) for (number, _), new in views.items()]
    return [views.get(which, which[0]) for which in recording.outputs]
