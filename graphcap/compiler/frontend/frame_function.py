"""The function that does what Dynamo's code for a frame does, where all guards hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from types import CellType, CodeType, FunctionType, MappingProxyType
from typing import Any, cast

from graphcap.compiler.frontend import dynamo
from graphcap.compiler.frontend.frame_code import FrameCode, Line, Value
from graphcap.compiler.frontend.guards import Guards
from graphcap.compiler.frontend.statics import Statics, leads_to_tensor

#: What a call returns that Dynamo has to decide.
MISS: Any = type("_Miss", (), {"__repr__": lambda self: "MISS", "__slots__": ()})()


class FrameWriter:
    """Writes the function for one graph.

    Attributes:
        frame: what Dynamo's code for the frame does.
        entry: the function that it is a frame of.
        cells: the closure of ``entry``, by name.
        bound: the objects that ``entry`` takes before the caller's arguments, by the name of the parameter.
    """

    def __init__(self, frame: FrameCode, entry: FunctionType, bound: tuple[Any, ...]) -> None:
        self.frame = frame
        self.entry = entry
        code = entry.__code__
        self.cells: dict[str, CellType] = dict(zip(code.co_freevars, entry.__closure__ or (), strict=True))
        self.bound = dict(zip(code.co_varnames, bound, strict=False))
        self._begins: list[Value] = []
        self._paths: dict[int, tuple[int, list[Value]]] = {}
        for position, argument in enumerate(frame.arguments):
            self._find_static(position, argument)

    def _find_static(self, position: int, argument: Value) -> None:
        """Whether an argument is found by a walk of at least two steps that begins at what belongs to the function."""
        path = argument.path()
        if len(path) < 3:
            return
        begin = path[1]
        try:
            owner = self.origin(path[0])
        except LookupError:
            return
        kind, key = cast("tuple[str, Any]", begin.step)
        first = getattr(owner, key, None) if kind == "attribute" else None
        if leads_to_tensor(first, [cast("tuple[str, Any]", value.step) for value in path[2:]]):
            if begin not in self._begins:
                self._begins.append(begin)
            self._paths[position] = (self._begins.index(begin), path[2:])

    def origin(self, value: Value) -> Any:
        """The object that a value without a parent is now.

        Raises:
            LookupError: it belongs to the caller, or there is none.
        """
        if value.origin == "cell":
            return self.cells[value.name].cell_contents
        return {"parameter": self.bound, "global": self.entry.__globals__}[value.origin][value.name]

    def function(
        self, guards: Guards, then: Sequence[str] = (), more: Mapping[str, Any] = MappingProxyType({})
    ) -> Callable[..., Any]:
        """The function: it takes what the frame takes, and returns what the frame returns, or :data:`MISS`.

        Args:
            guards: that it evaluates.
            then: lines that follow where they hold.
            more: what these use, without the prefix.
        """
        prefix = self.frame.prefix
        before, after = self.kept_lines(
            set(self._paths), {id(value) for _, path in self._paths.values() for value in path}, self._begins
        )
        body = [f"if not {prefix}guards({self.variables()}): return {prefix}MISS", *then, *before]
        names: dict[str, Any] = {"guards": guards, "MISS": MISS, **more}
        if self._paths:
            names["statics"] = self._statics()
            body.append(f"{prefix}args = {prefix}statics({', '.join(begin.text for begin in self._begins)})")
            body += self.call_with_statics(set(self._paths))
        else:
            body.append(self.call(", ".join(each.text for each in self.frame.arguments)))
        return self.define_frame([*body, *after], names)

    def call(self, arguments: str) -> str:
        """The line that calls the graph."""
        assert self.frame.output is not None
        graph = dynamo.graph_without_wrapper(self.entry.__globals__, self.frame.graph)
        return f"{self.frame.output.text} = {graph}({arguments})"

    def call_with_statics(self, static: Set[int]) -> list[str]:
        """The lines that call the graph with ``args``, a list in which all but the static arguments are missing."""
        prefix, arguments = self.frame.prefix, enumerate(self.frame.arguments)
        lines = [
            f"{prefix}args[{position}] = {argument.text}" for position, argument in arguments if position not in static
        ]
        assert self.frame.output is not None
        graph = dynamo.graph_without_wrapper(self.entry.__globals__, self.frame.graph)
        # Ours take the list as it is: to unpack it costs a reference to each of hundreds of parameters.
        takes_list = hasattr(eval(graph, self.entry.__globals__), "call_with")
        call = f"{graph}.call_with({prefix}args)" if takes_list else f"{graph}(*{prefix}args)"
        return [*lines, f"{self.frame.output.text} = {call}"]

    def define_frame(self, body: Sequence[str], names: dict[str, Any]) -> FunctionType:
        """A function that takes what the frame takes and returns what it returns.

        Args:
            body: its lines but for the last one.
            names: what they use besides what the frame does, without the prefix.
        """
        prefix, result = self.frame.prefix, self.frame.result
        assert result is not None
        used = {f"{prefix}{name}": value for name, value in names.items()} | self.frame.constants
        used |= {f"{prefix}cell_{name}": cell for name, cell in self.cells.items()}
        function = self._define("frame", self._parameters(), [*body, f"return {result.text}"], used)
        function.__defaults__, function.__kwdefaults__ = self.entry.__defaults__, self.entry.__kwdefaults__
        return function

    def _statics(self) -> Statics:
        """Fetches the static inputs as Dynamo's code does, from the second step on."""
        wanted = {id(value) for _, path in self._paths.values() for value in path}
        body = [line.text for line in self.frame.before if line.makes is not None and id(line.makes) in wanted]
        values = [self._paths[i][1][-1].text if i in self._paths else "None" for i in range(len(self.frame.arguments))]
        body.append(f"return [{', '.join(values)}]")
        fetch = self._define("fetch", ", ".join(begin.text for begin in self._begins), body, {})
        steps = {i: tuple(value.step for value in path) for i, (_, path) in self._paths.items()}
        return Statics(fetch, [(i, number, cast(Any, steps[i])) for i, (number, _) in self._paths.items()])

    def kept_lines(self, static: Set[int], walked: Set[int], begins: Sequence[Value]) -> tuple[list[str], list[str]]:
        """The lines before and after the call of the graph, without what only static inputs or nobody needs.

        Args:
            static: the positions of the static inputs.
            walked: the values (by ``id``) on the ways to them.
            begins: the values among these that are needed.
        """
        frame = self.frame
        assert frame.result is not None
        needed = {id(frame.result)}
        after = _needed(frame.after, needed, walked)
        needed |= {id(value) for i, value in enumerate(frame.arguments) if i not in static}
        needed |= {id(begin) for begin in begins}
        return _needed(frame.before, needed, walked), after

    def variables(self) -> str:
        """What the frame's variables are when it begins, as a dict display."""
        cells = [f"{name!r}: {self.cell(name)}" for name in self.cells]
        named = [f"{name!r}: {name}" for name in parameter_names(self.entry.__code__)]
        return f"{{{', '.join(named + cells)}}}"

    def cell(self, name: str) -> str:
        """The expression for what a closure cell holds."""
        return f"{self.frame.prefix}cell_{name}.cell_contents"

    def _parameters(self) -> str:
        """The parameters of the frame, as the source of a ``def`` has them."""
        code = self.entry.__code__
        names = list(parameter_names(code))
        count, keyword_only = code.co_argcount, code.co_kwonlyargcount
        listed = names[:count]
        if code.co_posonlyargcount:
            listed.insert(code.co_posonlyargcount, "/")
        rest = names[count + keyword_only :]
        if code.co_flags & 0x04:
            listed.append(f"*{rest.pop(0)}")
        elif keyword_only:
            listed.append("*")
        listed += names[count : count + keyword_only]
        return ", ".join(listed + [f"**{name}" for name in rest])

    def _define(self, name: str, parameters: str, body: Sequence[str], names: dict[str, Any]) -> FunctionType:
        """Define a function among the globals of the frame, with more names in a closure of its own."""
        entry, prefix = self.entry, self.frame.prefix
        lines = [f"def {prefix}make({', '.join(names)}):", f"  def {prefix}direct({parameters}):"]
        lines += [*(f"    {line}" for line in body), f"  return {prefix}direct"]
        made: dict[str, Any] = {}
        code = compile("\n".join(lines) + "\n", f"<graphcap {name} of {entry.__qualname__}>", "exec")
        exec(code, entry.__globals__, made)
        function = made[f"{prefix}make"](**names)
        function.__name__, function.__qualname__ = entry.__name__, entry.__qualname__
        return cast(FunctionType, function)


def parameter_names(code: CodeType) -> tuple[str, ...]:
    """The parameters of a function, those with stars last."""
    stars = bool(code.co_flags & 0x04) + bool(code.co_flags & 0x08)
    return code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + stars]


def _needed(lines: Sequence[Line], needed: set[int], droppable: Set[int]) -> list[str]:
    """The lines that make what is needed or do more than that; ``needed`` grows by what these need."""
    kept = []
    for line in reversed(lines):
        can_go = line.is_pure or id(line.makes) in droppable
        if not can_go or id(line.makes) in needed:
            kept.append(line.text)
            needed |= {id(value) for value in line.uses}
    return kept[::-1]
