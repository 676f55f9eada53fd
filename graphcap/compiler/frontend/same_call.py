"""The function for calls that look exactly like an earlier one, and what it shares with others for the graph."""

from __future__ import annotations

from collections.abc import Sequence
from types import FunctionType
from typing import Any, cast

from torch import nn

from graphcap.compiler.frontend.frame_code import Value
from graphcap.compiler.frontend.frame_function import MISS, FrameWriter, parameter_names
from graphcap.compiler.frontend.same_layout import SameLayout
from graphcap.compiler.frontend.seal import StaticInput
from graphcap.compiler.frontend.statics import Step, leads_to_tensor
from graphcap.cudagraph.dispatch.in_force import inputs_found

#: What a frame begins with: ``("parameter", name)``, ``("cell", name)`` or ``("global", name)``.
Origin = tuple[str, str]


class StaticPaths:
    """The inputs of a graph to which dicts lead from modules that a frame begins with.

    Attributes:
        positions: among the arguments of the graph.
    """

    def __init__(self, writer: FrameWriter, roots: dict[Origin, nn.Module]) -> None:
        """Those from these modules."""
        self._numbers = {origin: number for number, origin in enumerate(roots)}
        self._paths = {
            position: path
            for position, argument in enumerate(writer.frame.arguments)
            if (path := argument.path())
            and _origin(path[0]) in roots
            and leads_to_tensor(roots[_origin(path[0])], _steps(path))
        }
        self.positions = set(self._paths)

    def values(self) -> set[int]:
        """The values on the ways to them, by ``id``."""
        return {id(value) for path in self._paths.values() for value in path}

    def sources(self) -> set[str]:
        """Dynamo's names for them."""
        return {source(path) for path in self._paths.values()}

    def inputs(self) -> list[StaticInput]:
        """They themselves."""
        return [StaticInput(i, self._numbers[_origin(path[0])], _steps(path)) for i, path in self._paths.items()]


class CallBody:
    """The lines of functions for one graph: they get its arguments in two ways, and go on in the same one."""

    def __init__(
        self,
        writer: FrameWriter,
        paths: StaticPaths,
        unaliased: Sequence[str],
        of_step: tuple[tuple[str, ...], tuple[str, ...]],
    ) -> None:
        """For a graph.

        Args:
            writer: of the frame.
            paths: the inputs that are proved.
            unaliased: expressions for tensors that must not be among these.
            of_step: the inputs of the step that guards rely on, those that it has and those that it has not.
        """
        static = paths.positions
        before, self.after = writer.kept_lines(static, paths.values(), ())
        self.call = [*before, *writer.call_with_statics(static)]
        self.ids = f"({''.join(f'id({each}), ' for each in unaliased)})"
        self.values, self.no_more = _values(writer, of_step)
        self._writer = writer
        self._fetched = [position for position in range(len(writer.frame.arguments)) if position not in static]

    def again(self, layout: SameLayout, known: str, names: dict[str, Any]) -> FunctionType:
        """The function that compares layouts, and takes a list of arguments that is there.

        Args:
            layout: for which the guards on arguments have held.
            known: the expression for what is known besides, a ``seal.Known``, or ``None``.
            names: what it uses, without the prefix.
        """
        prefix = self._writer.frame.prefix
        forgotten = "".join(f"{prefix}args[{position}] = " for position in self._fetched)
        lines = [
            f"if not ({self.no_more} and {prefix}layout({self.values})): return {prefix}MISS",
            f"{prefix}known = {known}",
            f"if {prefix}known is None: return {prefix}MISS",
            f"try: {prefix}args = {prefix}known.spare.pop()",
            f"except IndexError: {prefix}args = {prefix}known.values.copy()",
            *self.call,
            *([f"{forgotten}None"] if forgotten else []),
            f"{prefix}known.spare.append({prefix}args)",
            *self.after,
        ]
        used = {"layout": layout, "of_step": inputs_found, "MISS": MISS, **names}
        return self._writer.define_frame(lines, used)


def _values(writer: FrameWriter, of_step: tuple[tuple[str, ...], tuple[str, ...]]) -> tuple[str, str]:
    """The expression for the tuple of a call's arguments and what its graph finds in the step, and the one for whether
    there are no other arguments."""
    code = writer.entry.__code__
    names = list(parameter_names(code))
    named = names[: code.co_argcount + code.co_kwonlyargcount]
    rest = names[len(named) :]
    listed = [f"{name}, " for name in named if name not in writer.bound]
    more = rest.pop(0) if code.co_flags & 0x04 else ""
    values = f"({''.join(listed)}{f'*{more}, ' if more else ''})" if listed or not more else more
    if any(of_step):
        values = f"(*{values}, *{writer.frame.prefix}of_step{of_step!r})"
    return values, f"not {rest[0]}" if rest else "True"


def _origin(value: Value) -> Origin:
    return value.origin, value.name


def _steps(path: list[Value]) -> tuple[Step, ...]:
    return tuple(cast(Step, value.step) for value in path[1:])


def source(path: list[Value]) -> str:
    """Dynamo's name for a value: ``"L['self']._modules['fc']"``."""
    begin = f"{'G' if path[0].origin == 'global' else 'L'}[{path[0].name!r}]"
    return begin + "".join(f".{key}" if kind == "attribute" else f"[{key!r}]" for kind, key in _steps(path))
