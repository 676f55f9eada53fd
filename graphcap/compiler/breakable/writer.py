"""The function of one step as text that can be read: one line per call, values dropped after their last use."""

from __future__ import annotations

import linecache
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphcap.compiler import private
from graphcap.compiler.breakable.calls import Call, Ref, Weak
from graphcap.compiler.breakable.groups import Group
from graphcap.compiler.rules import op_name


class StepWriter:
    """Writes the function of one step. Names count from 0 in every step, so that twins have one text."""

    def __init__(self, group: Group) -> None:
        self.reads: list[int] = []
        self.made: list[int] = []
        self._names: dict[int, str] = {}
        self._constants: dict[str, Any] = {}
        self._lines: list[str] = []
        self._uses: dict[str, int] = {}
        for call in group.calls:
            self._call(call)
        for new, number in group.views:
            self._line(f"{self._make(new)} = detach({self._read(number)})")

    def _call(self, call: Call) -> None:
        leaves = [_Name(self._read(leaf.value)) if isinstance(leaf, Ref) else leaf for leaf in call.leaves]
        args, kwargs = private.tree_unflatten(leaves, call.spec)
        for number in call.also:
            self._read(number)
        given = [self._text(arg) for arg in args] + [f"{key}={self._text(value)}" for key, value in kwargs.items()]
        function = self._constant(re.sub(r"\W+", "_", op_name(call.function)), call.function)
        text = f"{function}({', '.join(given)})"
        results = ["_" if number is None else self._make(number) for number in call.results]
        if call.bare and results:
            text = text if results == ["_"] else f"{results[0]} = {text}"
        elif any(number is not None for number in call.results):
            text = f"{', '.join(results)}, = flat({text})"
        self._line(f"{text}  # {call.origin.location.rpartition('/')[2]}")

    def _line(self, text: str) -> None:
        self._lines.append(text)

    def _read(self, number: int) -> str:
        if number not in self._names:
            self._names[number] = f"a{len(self.reads)}"
            self.reads.append(number)
        self._uses[self._names[number]] = len(self._lines)
        return self._names[number]

    def _make(self, number: int) -> str:
        self._names[number] = f"v{len(self.made)}"
        self.made.append(number)
        self._uses[self._names[number]] = len(self._lines)
        return self._names[number]

    def _constant(self, name: str, value: Any) -> str:
        for known, other in self._constants.items():
            if other is value:
                return known
        name = name if name not in self._constants else f"{name}_{len(self._constants)}"
        self._constants[name] = value
        return name

    def _text(self, value: Any) -> str:
        if isinstance(value, (list, tuple)) and type(value) in (list, tuple, torch.Size):
            inner = "".join(f"{self._text(each)}, " for each in value)
            return f"[{inner.rstrip(', ')}]" if isinstance(value, list) else f"({inner})"
        if isinstance(value, _Name) or value is None or type(value) in (bool, int, str):
            return repr(value)
        if type(value) is float and math.isfinite(value):
            return repr(value)
        if isinstance(value, dict):
            return "{" + ", ".join(f"{key!r}: {self._text(each)}" for key, each in value.items()) + "}"
        if isinstance(value, Weak):
            return f"{self._constant('weak', value.object)}()"
        return self._constant("constant", value)

    def finish(self, name: str, region: str, writes: Sequence[int]) -> tuple[Callable[..., Any], str, Any]:
        """The function, its text, and what it has in common with its twins."""
        kept = {self._names[number] for number in writes}
        lines = []
        for index, line in enumerate(self._lines):
            lines.append(f"    {line}")
            dead = [each for each, last in self._uses.items() if last == index and each not in kept]
            if dead:
                lines.append(f"    del {', '.join(dead)}")
        lines.append(f"    return [{', '.join(self._names[number] for number in writes)}]")
        body = "\n".join(lines)
        source = f"def {name}({', '.join(f'a{i}' for i in range(len(self.reads)))}):\n{body}\n"
        filename = f"<graphcap {region} {name}>"
        linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)  # tracebacks show the source
        namespace = {**self._constants, "flat": _flat, "detach": torch.Tensor.detach}
        exec(compile(source, filename, "exec"), namespace)  # the source was generated above
        functions = tuple(id(each) for each in self._constants.values())
        text = "\n".join(line.partition("  #")[0] for line in lines)
        return namespace[name], source, (text, functions)


@dataclass(frozen=True)
class _Name:
    text: str

    def __repr__(self) -> str:
        return self.text


def _flat(result: Any) -> list[Any]:
    return private.tree_flatten(result)[0]
