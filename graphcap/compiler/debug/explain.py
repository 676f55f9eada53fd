"""``graphcap.explain()``: find the regions that belong to what the user has in hand, and report on them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch

from graphcap.compiler import private
from graphcap.compiler.debug.report import Report
from graphcap.compiler.debug.snapshot import snapshot
from graphcap.compiler.frontend.api import record_of
from graphcap.compiler.frontend.target import CompiledTarget
from graphcap.compiler.region import Region, all_regions


def explain(target: Any = None) -> Report:
    """What graphcap did: how graphs were split, fused, compiled, captured and replayed, and why not where it was not.

    Args:
        target: a module, what ``torch.compile`` or ``graphcap.compile`` returned, an instance of a decorated class, a
            function or a bound method. Without it, everything in this process.

    Returns:
        A snapshot: ``print(report)`` is a table, ``report.to_dict()`` is JSON-ready. For something that was never
        called through graphcap it has no regions and its text says what to do.

    Raises:
        TypeError: ``target`` is nothing that could have been compiled.
    """
    regions = all_regions()
    if target is None:
        message = "" if regions else "nothing was compiled through graphcap in this process yet."
        return Report("this process", tuple(map(snapshot, regions)), message)
    subject = _subject(target)
    found = tuple(snapshot(region) for region in regions if subject.owns(region))
    record = subject.record
    notes = tuple(record.notes) if record is not None else ()
    message = "" if found else _served_by_a_sibling(subject, regions) or _never_called(subject)
    return Report(subject.name, found, message, notes)


@dataclass
class _Subject:
    """What identifies the regions of a target.

    Attributes:
        name: for the report.
        module_type: the class of a module.
        modules: ids of the module and its submodules.
        tensors: ids of their parameters and buffers.
        codes: code objects of a function.
        owner: for a bound method of a module, that module.
        record: what ``graphcap.compile`` knows about it.
        compiled_by_torch: whether it came out of ``torch.compile`` or ``module.compile()``.
    """

    name: str
    module_type: type[torch.nn.Module] | None = None
    modules: set[int] = field(default_factory=set)
    tensors: set[int] = field(default_factory=set)
    codes: list[CodeType] = field(default_factory=list)
    owner: torch.nn.Module | None = None
    record: CompiledTarget | None = None
    compiled_by_torch: bool = False

    def owns(self, region: Region) -> bool:
        """Whether a region was traced from this target, or computes with its parameters."""
        if self.codes:
            same_owner = self.owner is None or region.owner is None or region.owner is self.owner
            return same_owner and any(private.is_frame_of(region.code, code) for code in self.codes)
        return id(region.owner) in self.modules or region.shares_tensor_with(self.tensors)


def _subject(target: Any) -> _Subject:
    record = record_of(target)
    if record is not None and record.kind != "module":
        return _Subject(record.name, codes=[record.entry.__code__], record=record)
    original, compiled = private.original_of(target)
    if isinstance(original, torch.nn.Module):
        return _module_subject(original, record, compiled)
    if isinstance(original, type):
        raise TypeError(f"explain: {original.__name__} is a class; pass an instance of it")
    codes = list(dict.fromkeys(_codes(original)))
    if not codes:
        kind = type(target).__name__
        raise TypeError(f"explain: expected a module, function, bound method or compiled version of one, got {kind}")
    owner = original.__self__ if isinstance(original, MethodType) else None
    name = getattr(original, "__qualname__", type(original).__qualname__)
    module = owner if isinstance(owner, torch.nn.Module) else None
    return _Subject(name, codes=codes, owner=module, compiled_by_torch=compiled)


def _module_subject(module: torch.nn.Module, record: CompiledTarget | None, compiled: bool) -> _Subject:
    return _Subject(
        type(module).__name__,
        module_type=type(module),
        modules={id(each) for each in module.modules()},
        tensors={id(tensor) for tensor in (*module.parameters(), *module.buffers())},
        record=record,
        compiled_by_torch=compiled,
    )


def _codes(function: Any) -> Iterator[CodeType]:
    """The code of a callable and of what its decorators wrap."""
    if not isinstance(function, (FunctionType, MethodType)):
        function = getattr(type(function), "__call__", None)  # noqa: B004 - an object whose class makes it callable
    for each in (function, inspect.unwrap(function) if function is not None else None):
        code = getattr(each, "__code__", None)
        if isinstance(code, CodeType):
            yield code


def _served_by_a_sibling(subject: _Subject, regions: Sequence[Region]) -> str:
    """What there is to say about a module whose class was traced for another instance, ``""`` when none was."""
    siblings = [r.name for r in regions if subject.module_type is not None and type(r.owner) is subject.module_type]
    if not siblings or subject.record is not None:
        return ""
    return (
        f"nothing was traced for this {subject.name}. If it was called through torch.compile or module.compile(), "
        f"Dynamo served it with what it had traced for another {subject.name}: {', '.join(siblings)}. "
        "graphcap.compile(model) gives every instance graphs of its own."
    )


def _never_called(subject: _Subject) -> str:
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
