"""What a recording uses besides its arguments: where its tensors are found later, and what must stay as it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graphcap.compiler import private
from graphcap.compiler.breakable.calls import Kind
from graphcap.compiler.breakable.key import PLAIN, Arguments, layout_of
from graphcap.compiler.breakable.record import Recorder
from graphcap.compiler.breakable.state import TABLES, Found, Path, follow, is_tensor, walk


@dataclass(frozen=True)
class Outside:
    """The tensors from outside of one recording.

    Attributes:
        tensors: in the order of their values; one that no path leads to has none.
        shared: arguments that are found on a path as well, by number: whether the recorded operators read one or the
            other cannot be told, so they must be the same in every call.
    """

    tensors: list[Found]
    shared: list[tuple[int, Found]]

    def names(self, arguments: Arguments, names: Sequence[str], num_own_roots: int) -> list[str]:
        """What a user would call each tensor, given the names of the arguments' leaves."""
        return [
            f"held_{index}" if each.path is None else shown_name(each, arguments, names, num_own_roots)
            for index, each in enumerate(self.tensors)
        ]

    def note(self, recording: Recorder) -> str:
        """What the report says of tensors that no path leads to, ``""`` where there are none."""
        values = [value for value in recording.values if value.kind is Kind.OUTSIDE]
        held = [str(v.origin) for v, each in zip(values, self.tensors, strict=True) if each.path is None]
        if not held:
            return ""
        return (
            f"{len(held)} tensors are reached from no argument, attribute, closure or global that graphcap can see, "
            f"and are taken to be the same ones on every call; first used at {', '.join(held[:3])}"
        )

    def without_values(self) -> Outside:
        """The same, keeping none of the tensors alive."""
        tensors = [dataclasses.replace(each, value=None) for each in self.tensors]
        return Outside(tensors, [(number, dataclasses.replace(each, value=None)) for number, each in self.shared])

    def fits(self, roots: Sequence[Any], tensors: Sequence[torch.Tensor]) -> bool:
        """Whether the shared arguments of a call are still those on the path."""
        try:
            return all(
                _same_memory(follow(roots[found.root], found.path or ()), tensors[n]) for n, found in self.shared
            )
        except (LookupError, AttributeError, TypeError):
            return False


def find_outside(recording: Recorder, roots: Sequence[Any], tensors: Sequence[torch.Tensor]) -> Outside:
    """Look for the tensors of a recording.

    Args:
        recording: without a refusal.
        roots: where Python state is reached from.
        tensors: the arguments of the call that was recorded.
    """
    wanted = {id(t): t for v in recording.values if v.kind is Kind.OUTSIDE and (t := v.tensor()) is not None}
    paths: dict[int, Found] = {}
    shared: dict[int, Found] = {}
    for found in walk(roots):
        if not is_tensor(found.value):
            continue
        if id(found.value) in wanted:
            paths.setdefault(id(found.value), found)
        for number, tensor in enumerate(tensors):
            if _same_memory(found.value, tensor):
                shared.setdefault(number, found)
    return Outside([paths.get(key, Found(0, None, each)) for key, each in wanted.items()], list(shared.items()))


def shown_name(found: Found, arguments: Arguments, names: Sequence[str], num_own_roots: int) -> str:
    """What a user would call it: ``"fc.weight"``, and with the name of the argument ``"past_key_values.keys.0"``."""
    opaque = {id(each) for each in arguments.opaque()}
    roots = [name for leaf, name in zip(arguments.leaves, names, strict=True) if id(leaf) in opaque]
    return f"{roots[found.root - num_own_roots]}.{found.name}" if found.root >= num_own_roots else found.name


def facts(roots: Sequence[Any], num_own_roots: int) -> list[Found]:
    """What must stay as it is: modules, whether they train and what they have; plain values in closures, globals and
    arguments."""
    return [found for found in walk(roots) if isinstance(found.value, nn.Module) or _decides(found, num_own_roots)]


def _decides(found: Found, num_own_roots: int) -> bool:
    """Whether a dict or a plain value is among what decides what a call does."""
    path = found.path or ()
    if _is_table(path):
        return isinstance(found.value, dict)
    if not isinstance(found.value, PLAIN):
        return False
    kind, key = path[-1] if path else ("", "")
    is_missing = _is_table(path[:-1])  # a bias, a buffer or a module for which there is None
    is_attribute_that_counts = (kind, key) == ("attribute", "training")
    return kind in ("cell", "global") or found.root >= num_own_roots or is_attribute_that_counts or is_missing


def _is_table(path: Path) -> bool:
    """Whether a path leads to the modules, parameters or buffers of a module."""
    return bool(path) and path[-1][0] == "attribute" and path[-1][1] in TABLES


def _same_memory(a: Any, b: torch.Tensor) -> bool:
    if not is_tensor(a) or a.layout is not torch.strided:
        return False
    same_storage = private.storage_id(a) == private.storage_id(b)
    return same_storage and a.storage_offset() == b.storage_offset() and layout_of(a) == layout_of(b)
