"""The function for a graph where the guards on arguments are evaluated and the state of modules is sealed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from graphcap.compiler.frontend.frame_code import Value
from graphcap.compiler.frontend.frame_function import MISS, FrameWriter, parameter_names
from graphcap.compiler.frontend.guards import ArgumentGuards, Guards
from graphcap.compiler.frontend.seal import Seal, StaticInput
from graphcap.compiler.frontend.statics import Step, leads_to_tensor
from graphcap.cudagraph.dispatch.in_force import inputs_found


@dataclass(frozen=True, slots=True)
class SealedFunction:
    """A generated function and what it goes by.

    Attributes:
        function: takes what the frame takes, and returns what it returns, or :data:`MISS`.
        again: the same for calls that look like one that ``function`` has served, :data:`MISS` for others; ``None``
            where no call is known to look like another.
        seal: the state that it relies on.
        on_arguments: the guards that it evaluates while the seal holds.
    """

    function: Callable[..., Any]
    again: Callable[..., Any] | None
    seal: Seal
    on_arguments: ArgumentGuards


def sealed_function(writer: FrameWriter, guards: Guards, otherwise: Callable[..., Any]) -> SealedFunction | None:
    """Write the function for one graph.

    Args:
        writer: of the frame.
        guards: all guards of the graph.
        otherwise: the function that evaluates them; serves where the seal does not hold.

    Returns:
        ``None`` where it would be no better than ``otherwise``: there is no module whose state could be sealed, or
        torch does not tell which guards are on arguments.
    """
    frame, roots = writer.frame, _roots(writer)
    paths = {
        position: path
        for position, argument in enumerate(frame.arguments)
        if (path := argument.path())
        and _name(path[0]) in roots
        and leads_to_tensor(roots[_name(path[0])].module, _steps(path))
    }
    modules = {name for name, bound in writer.bound.items() if isinstance(bound, nn.Module)}
    on_arguments = guards.of_arguments(
        state={*modules, *writer.cells},
        fetched={_source(path) for i, a in enumerate(frame.arguments) if i not in paths and (path := a.path())},
        proved={_source(path) for path in paths.values()},
    )
    if not roots or on_arguments is None:
        return None
    numbers = {name: number for number, name in enumerate(roots)}
    statics = [StaticInput(position, numbers[_name(path[0])], _steps(path)) for position, path in paths.items()]
    seal = Seal(writer.entry.__qualname__, guards, statics, len(frame.arguments))
    layout = on_arguments.same_layout
    names = {"on_arguments": on_arguments, "seal": seal, "renew": seal.renew, "otherwise": otherwise, "MISS": MISS}
    names |= {"own_dict": _own_dict, "layout": layout, "of_step": inputs_found}
    body = _Body(writer, paths, list(roots.values()), on_arguments)
    again = writer.define_frame(body.again(), names) if layout is not None else None
    return SealedFunction(writer.define_frame(body.first(), names), again, seal, on_arguments)


class _Body:
    """The lines of both functions: they get the graph's arguments in two ways, and go on in the same one."""

    def __init__(
        self, writer: FrameWriter, paths: dict[int, list[Value]], roots: list[_Root], on_arguments: ArgumentGuards
    ) -> None:
        prefix = writer.frame.prefix
        static = set(paths)
        before, self._after = writer.kept_lines(static, {id(value) for path in paths.values() for value in path}, ())
        self._writer = writer
        self._fetched = [position for position in range(len(writer.frame.arguments)) if position not in static]
        self._call = [*before, *writer.call_with_statics(static)]
        self._ids = f"({''.join(f'id({each}), ' for each in on_arguments.unaliased)})"
        self._modules = ", ".join(root.text for root in roots)
        self._own_dicts = ", ".join(root.own_dict(prefix) for root in roots)
        self._learns = on_arguments.same_layout is not None
        self._values = _values(writer, on_arguments.of_step)

    def first(self) -> list[str]:
        """Evaluates the guards on arguments."""
        writer, prefix = self._writer, self._writer.frame.prefix
        values, no_more = self._values
        return [
            f"{prefix}locals = {writer.variables()}",
            f"if not {prefix}on_arguments({prefix}locals): return {prefix}MISS",
            *([f"if {no_more}: {prefix}layout.learn({values})"] if self._learns else []),
            f"{prefix}ids = {self._ids}",
            f"{prefix}args = {prefix}seal({prefix}ids, {self._own_dicts})",
            f"if {prefix}args is None:",
            f"  {prefix}args = {prefix}renew({prefix}locals, {prefix}ids, {self._modules})",
            f"  if {prefix}args is None: return {prefix}otherwise({_forwarded(writer)})",
            *self._call,
            *self._after,
        ]

    def again(self) -> list[str]:
        """Compares layouts, and takes a list of arguments that is there."""
        prefix = self._writer.frame.prefix
        values, no_more = self._values
        forgotten = "".join(f"{prefix}args[{position}] = " for position in self._fetched)
        return [
            f"if not ({no_more} and {prefix}layout({values})): return {prefix}MISS",
            f"{prefix}known = {prefix}seal.known({self._ids}, {self._own_dicts})",
            f"if {prefix}known is None: return {prefix}MISS",
            f"try: {prefix}args = {prefix}known.spare.pop()",
            f"except IndexError: {prefix}args = {prefix}known.values.copy()",
            *self._call,
            *([f"{forgotten}None"] if forgotten else []),
            f"{prefix}known.spare.append({prefix}args)",
            *self._after,
        ]


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


@dataclass(frozen=True, slots=True)
class _Root:
    """A module that a frame begins with, and the expression for it."""

    module: Any
    text: str
    may_change: bool  #: into an object that is no module

    def own_dict(self, prefix: str) -> str:
        """The expression for the module's own dict."""
        return f"{prefix}own_dict({self.text})" if self.may_change else f"{self.text}.__dict__"


def _own_dict(module: Any) -> dict[str, Any]:
    return module.__dict__ if isinstance(module, nn.Module) else {}


def _roots(writer: FrameWriter) -> dict[tuple[str, str], _Root]:
    """By where it comes from: the bound object, what closure cells hold, and globals that the function names."""
    found = {("parameter", name): _Root(bound, name, may_change=False) for name, bound in writer.bound.items()}
    for name, cell in writer.cells.items():
        found["cell", name] = _Root(cell.cell_contents, writer.cell(name), may_change=True)
    for name in writer.entry.__code__.co_names:
        if name in writer.entry.__globals__:
            found["global", name] = _Root(writer.entry.__globals__[name], name, may_change=True)
    return {name: root for name, root in found.items() if isinstance(root.module, nn.Module)}


def _name(origin: Value) -> tuple[str, str]:
    return origin.origin, origin.name


def _steps(path: list[Value]) -> tuple[Step, ...]:
    return tuple(cast(Step, value.step) for value in path[1:])


def _source(path: list[Value]) -> str:
    """Dynamo's name for a value: ``"L['self']._modules['fc']"``."""
    begin = f"{'G' if path[0].origin == 'global' else 'L'}[{path[0].name!r}]"
    return begin + "".join(f".{key}" if kind == "attribute" else f"[{key!r}]" for kind, key in _steps(path))


def _forwarded(writer: FrameWriter) -> str:
    """The arguments of a call that hands on what the frame takes."""
    code = writer.entry.__code__
    names = list(parameter_names(code))
    positional, named = code.co_argcount, code.co_argcount + code.co_kwonlyargcount
    rest = names[named:]
    listed = names[:positional]
    if code.co_flags & 0x04:
        listed.append(f"*{rest.pop(0)}")
    listed += [f"{name}={name}" for name in names[positional:named]]
    return ", ".join(listed + [f"**{name}" for name in rest])
