"""What Dynamo's code for a frame does: straight-line statements that fetch inputs, call the graph and return."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


class Unreadable(Exception):
    """Code that does something that cannot be expressed here; the text says what."""


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """Something on Dynamo's stack.

    Attributes:
        text: how the lines refer to it: a variable, a parameter or a literal.
        origin: ``"parameter"``, ``"global"`` or ``"cell"`` for what does not come out of another value.
        name: of the parameter, global or cell.
        parent: what an attribute or an item with a constant key was loaded from.
        step: ``("attribute", name)`` or ``("item", key)``.
    """

    text: str
    origin: str = ""
    name: str = ""
    parent: Value | None = None
    step: tuple[str, Any] | None = None

    def path(self) -> list[Value]:
        """The values from the origin to this one; empty where it was computed."""
        found: list[Value] = [self]
        while (parent := found[-1].parent) is not None:
            found.append(parent)
        return found[::-1] if found[-1].origin else []


@dataclass(frozen=True, slots=True)
class Line:
    """One statement.

    Attributes:
        text: the statement.
        makes: the value that it makes or, a list, fills; ``None`` where it changes something else.
        uses: the values that it needs.
        is_pure: whether it can be left out where nothing needs what it makes.
    """

    text: str
    makes: Value | None
    uses: tuple[Value, ...]
    is_pure: bool = False


@dataclass
class FrameCode:
    """What the frame does.

    Attributes:
        prefix: with which every variable of the lines begins, and no name of the frame.
        before: the statements before the graph is called.
        graph: the global that holds the compiled graph.
        arguments: what it is called with.
        output: the variable for what it returns.
        after: the statements after the call.
        result: what the frame returns.
        constants: objects that the lines use by name. (A closure cell ``x`` is called ``<prefix>cell_x`` there.)
    """

    prefix: str
    before: list[Line] = field(default_factory=list)
    graph: str = ""
    arguments: tuple[Value, ...] = ()
    output: Value | None = None
    after: list[Line] = field(default_factory=list)
    result: Value | None = None
    constants: dict[str, Any] = field(default_factory=dict)
