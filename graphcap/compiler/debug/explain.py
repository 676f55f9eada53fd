"""``graphcap.explain()``: find the regions that belong to what the user has in hand, and report on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graphcap.compiler.debug.report import RegionReport, Report
from graphcap.compiler.debug.snapshot import snapshot
from graphcap.compiler.frontend.subject import Subject, subject_of
from graphcap.compiler.region import Region, all_regions


def explain(target: Any = None) -> Report:
    """What graphcap did: how graphs were split, fused, compiled, captured and replayed, and why not where it was not.

    Args:
        target: a module, what ``torch.compile`` or ``graphcap.compile`` returned, an instance of a decorated class, a
            function or a bound method. Without it, everything in this process. Where Dynamo serves several instances
            with one graph, what is counted is counted for this one.

    Returns:
        A snapshot: ``print(report)`` is a table, ``report.to_dict()`` is JSON-ready. For something that was never
        called through graphcap it has no regions and its text says what to do.

    Raises:
        TypeError: ``target`` is nothing that could have been compiled.
    """
    regions = all_regions()
    if target is None:
        message = "" if regions else "nothing was compiled through graphcap in this process yet."
        return Report("this process", tuple(map(_whole, regions)), message)
    subject = subject_of(target)
    found = tuple(_part(region, subject) for region in regions if subject.owns(region))
    record = subject.record
    notes = tuple(record.notes) if record is not None else ()
    message = "" if found else _served_by_a_sibling(subject, regions) or _never_called(subject)
    unchecked = tuple(record.unchecked_guards()) if record is not None else ()
    return Report(subject.name, found, message, notes, unchecked)


def _whole(region: Region) -> RegionReport:
    """All that was counted in a region, whatever has become of the instances: such counters only grow."""
    return snapshot(region, *region.crew.counted())


def _part(region: Region, subject: Subject) -> RegionReport:
    """What was counted for one instance, as far as that can be told."""
    if subject.tensors and region.crew.are_of_several:
        return snapshot(region, subject.runners_in(region))
    return _whole(region)


def _served_by_a_sibling(subject: Subject, regions: Sequence[Region]) -> str:
    """What there is to say about a module whose class was traced for another instance, ``""`` when none was."""
    siblings = [r.name for r in regions if subject.module is not None and type(r.owner) is type(subject.module)]
    if not siblings or subject.record is not None:
        return ""
    return (
        f"nothing was traced for this {subject.name}. If it was called through torch.compile or module.compile(), "
        f"Dynamo served it with what it had traced for another {subject.name}: {', '.join(siblings)}. "
        "graphcap.compile(model) gives every instance graphs of its own."
    )


def _never_called(subject: Subject) -> str:
    """Why there is nothing to report, and what to do."""
    name, record = subject.name, subject.record
    if record is not None and record.is_eager and record.notes:
        return f"{record.notes[-1]}."
    if record is not None and record.is_eager:
        mode = record.config.compilation_mode
        why = "enforce_eager" if record.config.enforce_eager else f"compilation_mode={mode.name}"
        return f"{name} was never called through graphcap, and its settings say that it runs eager: {why}."
    if record is not None:
        return f"{name} is compiled with graphcap and was never called. Call it once."
    if subject.codes:
        ways = f"torch.compile({name}, backend='graphcap') or graphcap.compile({name})"
        return f"{name} was never called through graphcap. Call the result of {ways} once; {name} itself stays eager."
    if subject.compiled_by_torch:
        start = f"{name} is compiled, but no call of it has reached graphcap. Call it once"
    else:
        ways = "torch.compile(model, backend='graphcap'), model.compile(backend='graphcap') or graphcap.compile(model)"
        start = f"{name} was never called through graphcap. Call it once after {ways}"
    return (
        f"{start}, and check that the backend is 'graphcap'. If you called a method such as .generate() on the result "
        "of torch.compile, that ran the original module: use model.compile(backend='graphcap') or "
        "graphcap.compile(model), which work in place."
    )
