"""Dynamo's stack with pieces of Python text on it instead of values, and the lines that this makes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

from graphcap.compiler.frontend.frame_code import FrameCode, Line, Unreadable, Value

#: Dynamo's name for a compiled graph.
GRAPH = "__compiled_fn"
#: Its names for modules that its code imports.
_MODULE = "__import_"

#: Calls that only show a span in a profile, without a result that is used.
_SPANS = (("attribute", "record_pregraph_bytecode_enter"), ("attribute", "record_pregraph_bytecode_exit"))

#: Functions of Dynamo's that call a method where the frame hook does not see it, which is off here.
_METHODS = {
    ("attribute", "call_size"): "size",
    ("attribute", "call_stride"): "stride",
    ("attribute", "call_storage_offset"): "storage_offset",
}


@dataclass
class Loop:
    """A loop whose body is being read: where it begins, how deep the stack is, its variables."""

    start: int
    end: int
    depth: int
    read: set[str] = field(default_factory=set)
    set: set[str] = field(default_factory=set)


class TextStack:
    """A stack machine whose values are pieces of Python text."""

    def __init__(self, code: CodeType) -> None:
        names = {*code.co_varnames, *code.co_names, *code.co_freevars, *code.co_cellvars}
        prefix = "v"
        while any(name.startswith(prefix) for name in names):
            prefix = f"_{prefix}"
        self.frame = FrameCode(prefix)
        self.stack: list[Value] = []
        self.number = 0
        self.keywords: tuple[str, ...] = ()
        self.literals: dict[str, Any] = {}
        self.constants = code.co_consts
        self.offset = 0
        self.loop: Loop | None = None
        self.loop_end = -1
        flags = bool(code.co_flags & 0x04) + bool(code.co_flags & 0x08)  # *args, **kwargs
        parameters = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + flags]
        self.variables = {name: Value(name, origin="parameter", name=name) for name in parameters}

    def at(self, offset: int) -> None:
        """Go on to the instruction at ``offset``."""
        self.offset = offset
        if self.loop_end >= 0 and offset != self.loop_end:
            raise Unreadable("a loop is left to another place than its end")
        self.loop_end = -1

    def pop(self, count: int) -> list[Value]:
        """Take so many off the stack; the topmost is the last."""
        if count == 0:
            return []
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    def fresh(self) -> str:
        """A name for a new variable."""
        self.number += 1
        return f"{self.frame.prefix}{self.number}"

    def line(self, text: str, uses: Sequence[Value], makes: Value | None = None, *, is_pure: bool = False) -> None:
        """Write a statement; the parameters are those of :class:`~graphcap.compiler.frontend.frame_code.Line`."""
        lines = self.frame.after if self.frame.graph else self.frame.before
        if self.loop is None:
            lines.append(Line(text, makes, tuple(uses), is_pure))
        else:  # what one round leaves the next may need: nothing goes
            lines.append(Line(f"  {text}", makes, tuple(uses)))

    def push(self, expression: str, uses: Sequence[Value], *, is_pure: bool = False) -> None:
        """Push the value of an expression, which is evaluated now and once."""
        value = Value(self.fresh())
        self.line(f"{value.text} = {expression}", uses, value, is_pure=is_pure)
        self.stack.append(value)

    def push_load(self, expression: str, parent: Value, step: tuple[str, Any]) -> None:
        """Push an attribute or an item of ``parent``."""
        value = Value(self.fresh(), parent=parent, step=step)
        # An imported module gives what it has; another object may run code when it is asked.
        self.line(f"{value.text} = {expression}", (parent,), value, is_pure=_is_from_import(value))
        self.stack.append(value)

    def constant(self, value: Any) -> Value:
        """A constant of the code: as a literal where that is exact, or else by name."""
        if type(value) in (bool, int, str, type(None)) or (type(value) is float and math.isfinite(value)):
            self.literals[repr(value)] = value
            return Value(repr(value))
        name = self.fresh()
        self.frame.constants[name] = value
        return Value(name)

    def call(self, callee: Value, arguments: Sequence[Value], keywords: dict[str, Value]) -> None:
        """Push what a call returns; the call of the graph is noted.

        Raises:
            Unreadable: there is a second graph, or one that is called with keywords or in a loop.
        """
        if _is_from_import(callee) and callee.step in _SPANS:
            self.stack.append(self.constant(None))
            return
        if _is_from_import(callee) and callee.step in _METHODS and arguments and not keywords:
            listed = [each.text for each in arguments[1:]]
            self.push(f"{arguments[0].text}.{_METHODS[callee.step]}({', '.join(listed)})", arguments)
            return
        if not callee.name.startswith(GRAPH):
            listed = [a.text for a in arguments] + [f"{name}={value.text}" for name, value in keywords.items()]
            self.push(f"{callee.text}({', '.join(listed)})", [callee, *arguments, *keywords.values()])
            return
        if self.frame.graph:
            raise Unreadable("there are several graphs")
        if keywords or self.loop is not None:
            raise Unreadable("the graph is called with keywords or in a loop")
        self.frame.graph, self.frame.arguments = callee.name, tuple(arguments)
        self.frame.output = Value(self.fresh())
        self.stack.append(self.frame.output)


def _is_from_import(value: Value) -> bool:
    return value.parent is not None and value.parent.name.startswith(_MODULE)
