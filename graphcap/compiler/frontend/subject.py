"""What the user has in hand, and which compiled regions belong to it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch

from graphcap.compiler import private
from graphcap.compiler.frontend.api import record_of
from graphcap.compiler.frontend.target import CompiledTarget
from graphcap.compiler.region import Region, all_regions
from graphcap.cudagraph import GraphRunner


@dataclass
class Subject:
    """What identifies the regions of a target.

    Attributes:
        name: for the report.
        module: a module.
        modules: ids of it and its submodules.
        tensors: ids of their parameters and buffers, or of those of the owner.
        codes: code objects of a function.
        owner: for a bound method of a module, that module.
        record: what ``graphcap.compile`` knows about it.
        compiled_by_torch: whether it came out of ``torch.compile`` or ``module.compile()``.
    """

    name: str
    module: torch.nn.Module | None = None
    modules: set[int] = field(default_factory=set)
    tensors: set[int] = field(default_factory=set)
    codes: list[CodeType] = field(default_factory=list)
    owner: torch.nn.Module | None = None
    record: CompiledTarget | None = None
    compiled_by_torch: bool = False

    def owns(self, region: Region) -> bool:
        """Whether a region was traced from this target, or serves it."""
        if self.codes:
            return self._is_of_owner(region) and any(private.is_frame_of(region.code, code) for code in self.codes)
        if id(region.owner) in self.modules:
            return True
        return self._is_served_by(region)

    def _is_of_owner(self, region: Region) -> bool:
        if self.owner is None or region.owner is None or region.owner is self.owner:
            return True
        return type(region.owner) is type(self.owner) and region.is_mostly_of(self.tensors)

    def _is_served_by(self, region: Region) -> bool:
        """Whether what was traced for another one serves the module, as it computes with its parameters: for what the
        module is a part of, or for a module of its class or of that of a part of it, with which Dynamo shares a graph.
        Two models that have an embedding in common have no more in common."""
        owner = region.owner
        if not isinstance(owner, torch.nn.Module) or any(each is self.module for each in owner.modules()):
            return region.shares_tensor_with(self.tensors)
        if self.module is None or record_of(owner) is not None:
            return False
        alike = (each for each in self.module.modules() if type(each) is type(owner))
        return any(region.is_mostly_of(_tensors_of(each)) for each in alike)

    def regions(self) -> list[Region]:
        """The regions that it owns now."""
        return [region for region in all_regions() if self.owns(region)]

    def runners_in(self, region: Region) -> list[GraphRunner]:
        """The runners of a region that serve it: all of them where it is a function, which may be called with any."""
        return region.crew.of(self.tensors) if self.tensors else region.runners

    def runners(self) -> list[GraphRunner]:
        """The runners of all of them, in the order of compilation."""
        return [runner for region in self.regions() for runner in self.runners_in(region)]


def subject_of(target: Any) -> Subject:
    """Recognise a module, a compiled module, a function, a bound method, or an instance of a decorated class.

    Raises:
        TypeError: it is none of these.
    """
    record = target if isinstance(target, CompiledTarget) else record_of(target)
    if record is not None and record.kind != "module":
        owner = _owner_of(target)
        return Subject(
            record.name, codes=[record.entry.__code__], owner=owner, tensors=_tensors_of(owner), record=record
        )
    if isinstance(target, CompiledTarget):
        target = target.original
    original, compiled = private.original_of(target)
    if isinstance(original, torch.nn.Module):
        return _module_subject(original, record, compiled)
    if isinstance(original, type):
        raise TypeError(f"graphcap: {original.__name__} is a class; pass an instance of it")
    codes = list(dict.fromkeys(_codes(original)))
    if not codes:
        kind = type(target).__name__
        raise TypeError(f"graphcap: expected a module, function, bound method or compiled version of one, got {kind}")
    owner = _owner_of(original)
    name = getattr(original, "__qualname__", type(original).__qualname__)
    return Subject(name, codes=codes, owner=owner, tensors=_tensors_of(owner), compiled_by_torch=compiled)


def _module_subject(module: torch.nn.Module, record: CompiledTarget | None, compiled: bool) -> Subject:
    return Subject(
        type(module).__name__,
        module=module,
        modules={id(each) for each in module.modules()},
        tensors=_tensors_of(module),
        record=record,
        compiled_by_torch=compiled,
    )


def _owner_of(function: Any) -> torch.nn.Module | None:
    """For a bound method of a module, that module."""
    owner = function.__self__ if isinstance(function, MethodType) else None
    return owner if isinstance(owner, torch.nn.Module) else None


def _tensors_of(module: torch.nn.Module | None) -> set[int]:
    return set() if module is None else {id(tensor) for tensor in (*module.parameters(), *module.buffers())}


def _codes(function: Any) -> Iterator[CodeType]:
    """The code of a callable and of what its decorators wrap."""
    if not isinstance(function, (FunctionType, MethodType)):
        function = getattr(type(function), "__call__", None)  # noqa: B004 - an object whose class makes it callable
    for each in (function, inspect.unwrap(function) if function is not None else None):
        code = getattr(each, "__code__", None)
        if isinstance(code, CodeType):
            yield code


def regions_of(target: Any) -> list[Region]:
    """The regions that were traced from a target, or that serve it.

    Raises:
        TypeError: ``target`` is nothing that could have been compiled.
    """
    return subject_of(target).regions()


def runners_of(target: Any) -> list[GraphRunner]:
    """The graph runners of everything that was compiled for a target, in the order of compilation.

    Raises:
        TypeError: as for :func:`regions_of`.
    """
    return subject_of(target).runners()
