"""Reads the code that Dynamo made of a frame: straight-line bytecode that fetches inputs and calls the graph.

:func:`read` turns it into lines of Python, instruction by instruction and in the same order, so that they do what the
bytecode does, side effects included. A loop over items, as Dynamo writes it to fill an ``OrderedDict``, stays a loop.
What it does not know it refuses, by name: an unknown instruction can cost speed, never a result. It knows what Dynamo
writes on Python 3.11 to 3.13.
"""

from __future__ import annotations

import dis
import keyword
import sys
from types import CodeType
from typing import Any

from graphcap.compiler.frontend.frame_code import FrameCode, Unreadable, Value
from graphcap.compiler.frontend.text_stack import GRAPH, Loop, TextStack

#: Dynamo's name for the rest of a frame after a graph break.
_RESUME = "__resume_at"

#: Instructions that prepare, cache or forget, and mean nothing here: a variable is forgotten when the call ends.
_IGNORED = frozenset({"RESUME", "NOP", "CACHE", "PRECALL", "COPY_FREE_VARS", "EXTENDED_ARG", "DELETE_FAST"})

_NULL = Value("<null>")


def read(code: CodeType) -> FrameCode:
    """Read what Dynamo made of a frame.

    Raises:
        Unreadable: it has branches, other than one graph, or an instruction that is not known here.
    """
    if any(name.startswith(_RESUME) for name in code.co_names):
        raise Unreadable("there is a graph break")
    reader = _Reader(code)
    for instruction in dis.get_instructions(code):
        if instruction.opname in _IGNORED:
            continue
        reader.at(instruction.offset)
        handler = getattr(reader, f"op_{instruction.opname.lower()}", None)
        if handler is None:
            raise Unreadable(f"Dynamo's code has a {instruction.opname}")
        handler(instruction.arg or 0, instruction.argval)
    if not reader.frame.graph:
        raise Unreadable("there is no graph")
    if reader.frame.result is None:
        raise Unreadable("Dynamo's code does not return")
    return reader.frame


class _Reader(TextStack):
    """One method per instruction."""

    # -- loads and stores

    def op_load_const(self, arg: int, value: Any) -> None:
        self.stack.append(self.constant(value))

    def op_load_fast(self, arg: int, name: str) -> None:
        if name not in self.variables:
            raise Unreadable(f"Dynamo's code reads {name!r} where it may not be set")
        if self.loop is not None:
            self.loop.read.add(name)
        self.stack.append(self.variables[name])

    op_load_fast_check = op_load_fast

    def op_store_fast(self, arg: int, name: str) -> None:
        if self.loop is not None:
            if name in self.loop.read - self.loop.set:
                raise Unreadable(f"a loop hands {name!r} on to its next round")
            self.loop.set.add(name)
        self.variables[name] = self.stack.pop()

    def op_load_fast_load_fast(self, arg: int, names: tuple[str, str]) -> None:
        for name in names:
            self.op_load_fast(arg, name)

    def op_store_fast_store_fast(self, arg: int, names: tuple[str, str]) -> None:
        for name in names:
            self.op_store_fast(arg, name)

    def op_store_fast_load_fast(self, arg: int, names: tuple[str, str]) -> None:
        self.op_store_fast(arg, names[0])
        self.op_load_fast(arg, names[1])

    def op_load_global(self, arg: int, name: str) -> None:
        if not name.isidentifier() or keyword.iskeyword(name):
            raise Unreadable(f"a global is named {name!r}")
        value = Value(self.fresh(), origin="global", name=name)
        if not name.startswith(GRAPH):
            self.line(f"{value.text} = {name}", (), value, is_pure=True)
        self._push_callable(value, has_null=bool(arg & 1))

    def op_load_deref(self, arg: int, name: str) -> None:
        value = Value(self.fresh(), origin="cell", name=name)
        self.line(f"{value.text} = {self.frame.prefix}cell_{name}.cell_contents", (), value, is_pure=True)
        self.stack.append(value)

    def op_load_attr(self, arg: int, name: str) -> None:
        parent = self.stack.pop()
        # A bound method and its call are two steps here as in the source.
        self.push_load(f"{parent.text}.{name}", parent, ("attribute", name))
        if _LOAD_ATTR_HAS_METHOD_BIT and arg & 1:
            self._push_callable(self.stack.pop(), has_null=True)

    def op_load_method(self, arg: int, name: str) -> None:
        parent = self.stack.pop()
        self.push_load(f"{parent.text}.{name}", parent, ("attribute", name))
        self._push_callable(self.stack.pop(), has_null=True)

    def op_store_attr(self, arg: int, name: str) -> None:
        value, target = self.pop(2)
        self.line(f"{target.text}.{name} = {value.text}", (value, target))

    def op_binary_subscr(self, arg: int, argval: Any) -> None:
        container, key = self.pop(2)
        expression = f"{container.text}[{key.text}]"
        if key.text in self.literals:
            self.push_load(expression, container, ("item", self.literals[key.text]))
        else:
            self.push(expression, (container, key))

    def op_store_subscr(self, arg: int, argval: Any) -> None:
        value, container, key = self.pop(3)
        self.line(f"{container.text}[{key.text}] = {value.text}", (value, container, key))

    def op_delete_subscr(self, arg: int, argval: Any) -> None:
        container, key = self.pop(2)
        self.line(f"del {container.text}[{key.text}]", (container, key))

    # -- moves on the stack

    def op_push_null(self, arg: int, argval: Any) -> None:
        self.stack.append(_NULL)

    def op_pop_top(self, arg: int, argval: Any) -> None:
        self.stack.pop()

    def op_copy(self, depth: int, argval: Any) -> None:
        self.stack.append(self.stack[-depth])

    def op_swap(self, depth: int, argval: Any) -> None:
        self.stack[-1], self.stack[-depth] = self.stack[-depth], self.stack[-1]

    # -- containers

    def op_build_tuple(self, count: int, argval: Any) -> None:
        values = self.pop(count)
        self.push(f"({''.join(f'{v.text}, ' for v in values)})", values, is_pure=True)

    def op_build_list(self, count: int, argval: Any) -> None:
        values = self.pop(count)
        self.push(f"[{', '.join(v.text for v in values)}]", values, is_pure=True)

    def op_build_map(self, count: int, argval: Any) -> None:
        values = self.pop(2 * count)
        pairs = zip(values[::2], values[1::2], strict=True)
        self.push(f"{{{', '.join(f'{key.text}: {value.text}' for key, value in pairs)}}}", values, is_pure=True)

    def op_build_const_key_map(self, count: int, argval: Any) -> None:
        keys = self._constant_tuple(self.stack.pop())
        values = self.pop(count)
        pairs = zip((self.constant(key) for key in keys), values, strict=True)
        self.push(f"{{{', '.join(f'{key.text}: {value.text}' for key, value in pairs)}}}", values)

    def op_build_slice(self, count: int, argval: Any) -> None:
        values = self.pop(count)
        name = f"{self.frame.prefix}slice"
        self.frame.constants[name] = slice
        self.push(f"{name}({', '.join(v.text for v in values)})", values)

    def op_list_extend(self, depth: int, argval: Any) -> None:
        more = self.stack.pop()
        target = self.stack[-depth]
        self.line(f"{target.text}.extend({more.text})", (target, more), target, is_pure=True)

    def op_unpack_sequence(self, count: int, argval: Any) -> None:
        whole = self.stack.pop()
        parts = [Value(self.fresh()) for _ in range(count)]
        self.line(f"{''.join(f'{part.text}, ' for part in parts)} = {whole.text}", (whole,))
        self.stack.extend(reversed(parts))

    # -- a loop

    def op_get_iter(self, arg: int, argval: Any) -> None:
        iterable = self.stack.pop()
        self.push(f"iter({iterable.text})", (iterable,))

    def op_for_iter(self, arg: int, end: int) -> None:
        if self.loop is not None:
            raise Unreadable("a loop is in a loop")
        iterator, item = self.stack[-1], Value(self.fresh())
        self.line(f"for {item.text} in {iterator.text}:", (iterator,))
        self.loop = Loop(self.offset, end, len(self.stack))
        self.stack.append(item)

    def op_jump_backward(self, arg: int, start: int) -> None:
        loop = self.loop
        if loop is None or start != loop.start or len(self.stack) != loop.depth:
            raise Unreadable("Dynamo's code has a JUMP_BACKWARD that ends no simple loop")
        self.line("pass", ())
        self.loop, self.loop_end = None, loop.end
        for name in loop.set:
            self.variables.pop(name, None)
        if sys.version_info < (3, 12):  # later Pythons have instructions that take the iterator away
            self.stack.pop()

    def op_end_for(self, arg: int, argval: Any) -> None:
        if sys.version_info < (3, 13):
            self.stack.pop()

    # -- calls and the end

    def op_kw_names(self, arg: int, argval: Any) -> None:
        self.keywords = self.constants[arg]

    def op_call(self, count: int, argval: Any) -> None:
        arguments = self.pop(count)
        callee = self._pop_callee(arguments)
        names, self.keywords = self.keywords, ()
        split = len(arguments) - len(names)
        self.call(callee, arguments[:split], dict(zip(names, arguments[split:], strict=True)))

    def op_call_kw(self, count: int, argval: Any) -> None:
        self.keywords = self._constant_tuple(self.stack.pop())
        self.op_call(count, argval)

    def op_return_value(self, arg: int, argval: Any) -> None:
        if self.frame.result is not None or self.loop is not None:
            raise Unreadable("Dynamo's code has several ends")
        self.frame.result = self.stack.pop()

    def op_return_const(self, arg: int, value: Any) -> None:
        self.stack.append(self.constant(value))
        self.op_return_value(arg, value)

    def _push_callable(self, value: Value, *, has_null: bool) -> None:
        # Which of the two is on top differs between Pythons; _pop_callee takes either.
        self.stack.extend([_NULL, value] if has_null else [value])

    def _pop_callee(self, arguments: list[Value]) -> Value:
        below, top = self.pop(2)
        if below is _NULL or top is _NULL:
            return top if below is _NULL else below
        arguments.insert(0, top)  # a callable, and the object that it is a method of
        return below

    def _constant_tuple(self, value: Value) -> tuple[Any, ...]:
        found = self.frame.constants.get(value.text)
        if not isinstance(found, tuple):
            raise Unreadable("Dynamo's code has keys that are no constants")
        return found


_LOAD_ATTR_HAS_METHOD_BIT = "LOAD_METHOD" not in dis.opmap or dis.opmap["LOAD_METHOD"] > 255
