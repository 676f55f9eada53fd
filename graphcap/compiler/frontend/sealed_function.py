"""The function for a graph where the guards on arguments are evaluated and the state of modules is sealed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from graphcap.compiler.frontend.frame_function import MISS, FrameWriter, parameter_names
from graphcap.compiler.frontend.guards import ArgumentGuards, Guards
from graphcap.compiler.frontend.same_call import CallBody, Origin, StaticPaths, source
from graphcap.compiler.frontend.seal import Seal
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

    def others_evaluated(self) -> None:
        """Dynamo may have evaluated the guards since, under other circumstances."""
        self.on_arguments.others_evaluated()


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
    paths = StaticPaths(writer, {origin: root.module for origin, root in roots.items()})
    modules = {name for name, bound in writer.bound.items() if isinstance(bound, nn.Module)}
    arguments = [(i, path) for i, argument in enumerate(frame.arguments) if (path := argument.path())]
    on_arguments = guards.of_arguments(
        state={*modules, *writer.cells},
        fetched={source(path) for i, path in arguments if i not in paths.positions},
        proved=paths.sources(),
    )
    if not roots or on_arguments is None:
        return None
    seal = Seal(writer.entry.__qualname__, guards, paths.inputs(), len(frame.arguments))
    layout, prefix = on_arguments.same_layout, frame.prefix
    body = CallBody(writer, paths, on_arguments.unaliased, on_arguments.of_step)
    own_dicts = ", ".join(root.own_dict(prefix) for root in roots.values())
    names = {"seal": seal, "own_dict": _own_dict}
    again = None
    if layout is not None:
        again = body.again(layout, f"{prefix}seal.known({body.ids}, {own_dicts})", names)
    lines = [
        f"{prefix}locals = {writer.variables()}",
        f"if not {prefix}on_arguments({prefix}locals): return {prefix}MISS",
        *([f"if {body.no_more}: {prefix}layout.learn({body.values})"] if layout is not None else []),
        f"{prefix}ids = {body.ids}",
        f"{prefix}args = {prefix}seal({prefix}ids, {own_dicts})",
        f"if {prefix}args is None:",
        f"  {prefix}args = {prefix}renew({prefix}locals, {prefix}ids, {', '.join(r.text for r in roots.values())})",
        f"  if {prefix}args is None: return {prefix}otherwise({_forwarded(writer)})",
        *body.call,
        *body.after,
    ]
    names |= {"on_arguments": on_arguments, "renew": seal.renew, "otherwise": otherwise, "MISS": MISS}
    names |= {"layout": layout, "of_step": inputs_found}
    return SealedFunction(writer.define_frame(lines, names), again, seal, on_arguments)


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


def _roots(writer: FrameWriter) -> dict[Origin, _Root]:
    """By where it comes from: the bound object, what closure cells hold, and globals that the function names."""
    found: dict[Origin, _Root] = {
        ("parameter", name): _Root(bound, name, may_change=False) for name, bound in writer.bound.items()
    }
    for name, cell in writer.cells.items():
        found["cell", name] = _Root(cell.cell_contents, writer.cell(name), may_change=True)
    for name in writer.entry.__code__.co_names:
        if name in writer.entry.__globals__:
            found["global", name] = _Root(writer.entry.__globals__[name], name, may_change=True)
    return {name: root for name, root in found.items() if isinstance(root.module, nn.Module)}


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
