"""Calls around Dynamo's frame hook, with its guards.

``torch.compile`` finds the graph for a call in a hook that runs when the frame of the compiled function is evaluated.
The guards themselves are cheap; the hook, the wrappers around it, and the code that fetches hundreds of parameters for
the graph are not. A target that calls the same function again and again can do without: for each graph that Dynamo has
made of it, :class:`DirectCalls` has a generated function that

1. evaluates the guards (all of them, on every call, with the variables that the frame would have had),
2. does what Dynamo's code for the frame does, line by line (:mod:`graphcap.compiler.frontend.frame_code`), side effects
   included, except that parameters, buffers and module attributes are proved to be those of the last call where that is
   cheaper than fetching them (:mod:`graphcap.compiler.frontend.statics`).

Whatever is not understood, and every call for which no guards hold, goes through Dynamo, which decides, traces and
recompiles. Nothing here keeps a graph alive: a generated function asks Dynamo for its guards and the globals of the
frame for the graph, and steps aside when they are gone.

Microseconds per call of a decoder with 226 parameters in 312 modules and a graph that does nothing (one CPU core):

=====================================  ==========  ==========
..                                     torch 2.11  torch 2.13
=====================================  ==========  ==========
``nn.Module.compile()``                        29         109
``graphcap.compile``, through Dynamo           32         113
``graphcap.compile``, direct                   18          94
of it the guards                              4.6          75
of it the proof of 848 dict entries           7.4         7.3
instead of it, fetching                        21          21
=====================================  ==========  ==========

(The proof is the C++ one; without it inputs are fetched.) From 2.12 on torch no longer skips module trees whose dicts
are unchanged (``use_recursive_dict_tags_for_guards``), because the skip has crashed; it is not turned on here either.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from types import CellType, CodeType, FunctionType
from typing import Any, cast

from graphcap.compiler.frontend import dynamo
from graphcap.compiler.frontend.frame_code import FrameCode, Line, Unreadable, Value, read
from graphcap.compiler.frontend.statics import Statics, leads_to_tensor

log = logging.getLogger(__name__)

#: What a call returns that Dynamo has to decide.
MISS: Any = type("_Miss", (), {"__repr__": lambda self: "MISS", "__slots__": ()})()


class DirectCalls:
    """The direct ways to the graphs of one function.

    Attributes:
        count: calls that took one.
        refused: why there is none to a graph, one line for each reason.
    """

    def __init__(self, entry: FunctionType) -> None:
        self.count = 0
        self.refused: list[str] = []
        self._entry = entry
        self._is_plain: Callable[[], bool] = lambda: False
        self._ways: tuple[tuple[dynamo.Guards, Callable[..., Any] | None], ...] = ()
        self._functions: tuple[Callable[..., Any], ...] = ()

    def __call__(self, bound: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of a call, or :data:`MISS` when nothing has run."""
        if self._functions and self._is_plain():
            try:
                for function in self._functions:
                    result = function(*bound, *args, **kwargs)
                    if result is not MISS:
                        self.count += 1
                        return result
            except BaseException:
                dynamo.leave_functorch_layers()
                raise
        return MISS

    def learn(self, bound: tuple[Any, ...]) -> list[str]:
        """Take over what Dynamo has compiled since, and forget what it has dropped.

        Args:
            bound: the object that the function takes before the caller's arguments, if any.

        Returns:
            New reasons in ``refused``.
        """
        num_refused = len(self.refused)
        known = [(guards, function) for guards, function in self._ways if not guards.are_dropped]
        ways = []
        for manager, code in dynamo.compiled_frames(self._entry.__code__):
            found = next((way for way in known if way[0].belong_to(manager)), None)
            ways.append(found or self._way(dynamo.Guards(manager), code, bound))
        self._ways = tuple(ways)
        self._functions = tuple(function for _, function in ways if function is not None)
        if self._functions:
            self._is_plain = dynamo.plain_caller()
        return self.refused[num_refused:]

    def _way(
        self, guards: dynamo.Guards, code: CodeType, bound: tuple[Any, ...]
    ) -> tuple[dynamo.Guards, Callable[..., Any] | None]:
        try:
            return guards, _Writer(read(code), self._entry, bound).function(guards)
        except Unreadable as unreadable:
            reason = str(unreadable)
        except Exception as error:  # a fault of ours: Dynamo goes on serving
            log.warning("%s: no direct calls: %s", self._entry.__qualname__, error, exc_info=True)
            reason = f"{type(error).__name__}: {error}"
        if reason not in self.refused:
            self.refused.append(reason)
        return guards, None


class _Writer:
    """Writes the function for one graph."""

    def __init__(self, frame: FrameCode, entry: FunctionType, bound: tuple[Any, ...]) -> None:
        self._frame = frame
        self._entry = entry
        code = entry.__code__
        cells = dict(zip(code.co_freevars, entry.__closure__ or (), strict=True))
        self._cells: dict[str, CellType] = cells
        self._begins: list[Value] = []
        self._paths: dict[int, tuple[int, list[Value]]] = {}
        for position, argument in enumerate(frame.arguments):
            self._find_static(position, argument, dict(zip(code.co_varnames, bound, strict=False)))

    def _find_static(self, position: int, argument: Value, bound: dict[str, Any]) -> None:
        """Whether an argument is found by a walk of at least two steps that begins at what belongs to the function."""
        path = argument.path()
        if len(path) < 3:
            return
        origin, begin = path[0], path[1]
        places = {"parameter": bound, "global": self._entry.__globals__, "cell": self._cells}
        place = places[origin.origin]
        if origin.name not in place:
            return
        owner = place[origin.name] if origin.origin != "cell" else self._cells[origin.name].cell_contents
        kind, key = cast("tuple[str, Any]", begin.step)
        first = getattr(owner, key, None) if kind == "attribute" else None
        if leads_to_tensor(first, [cast("tuple[str, Any]", value.step) for value in path[2:]]):
            if begin not in self._begins:
                self._begins.append(begin)
            self._paths[position] = (self._begins.index(begin), path[2:])

    def function(self, guards: dynamo.Guards) -> Callable[..., Any]:
        """The function: it takes what the frame takes, and returns what the frame returns, or :data:`MISS`."""
        frame, prefix = self._frame, self._frame.prefix
        names: dict[str, Any] = {f"{prefix}guards": guards, f"{prefix}MISS": MISS, **frame.constants}
        names |= {f"{prefix}cell_{name}": cell for name, cell in self._cells.items()}
        graph = dynamo.graph_without_wrapper(self._entry.__globals__, frame.graph)
        assert frame.output is not None
        assert frame.result is not None
        before, after = self._kept()
        variables = ", ".join(self._frame_variables())
        body = [f"if not {prefix}guards({{{variables}}}): return {prefix}MISS", *before]
        if self._paths:
            names[f"{prefix}statics"] = self._statics()
            body.append(f"{prefix}args = {prefix}statics({', '.join(begin.text for begin in self._begins)})")
            live = [(i, argument) for i, argument in enumerate(frame.arguments) if i not in self._paths]
            body += [f"{prefix}args[{position}] = {argument.text}" for position, argument in live]
            body.append(f"{frame.output.text} = {graph}(*{prefix}args)")
        else:
            body.append(f"{frame.output.text} = {graph}({', '.join(each.text for each in frame.arguments)})")
        body += [*after, f"return {frame.result.text}"]
        function = self._define("frame", self._parameters(), body, names)
        function.__defaults__, function.__kwdefaults__ = self._entry.__defaults__, self._entry.__kwdefaults__
        return function

    def _statics(self) -> Statics:
        """Fetches the static inputs as Dynamo's code does, from the second step on."""
        wanted = {id(value) for _, path in self._paths.values() for value in path}
        body = [line.text for line in self._frame.before if line.makes is not None and id(line.makes) in wanted]
        values = [self._paths[i][1][-1].text if i in self._paths else "None" for i in range(len(self._frame.arguments))]
        body.append(f"return [{', '.join(values)}]")
        fetch = self._define("fetch", ", ".join(begin.text for begin in self._begins), body, {})
        steps = {i: tuple(value.step for value in path) for i, (_, path) in self._paths.items()}
        return Statics(fetch, [(i, number, cast(Any, steps[i])) for i, (number, _) in self._paths.items()])

    def _kept(self) -> tuple[list[str], list[str]]:
        """The lines before and after the call of the graph, without what only static inputs or nobody needs."""
        frame = self._frame
        assert frame.result is not None
        walked = {id(value) for _, path in self._paths.values() for value in path}
        needed = {id(frame.result)}
        after = _needed(frame.after, needed, walked)
        needed |= {id(value) for i, value in enumerate(frame.arguments) if i not in self._paths}
        needed |= {id(begin) for begin in self._begins}
        return _needed(frame.before, needed, walked), after

    def _frame_variables(self) -> list[str]:
        """What the frame's variables are when it begins, as the items of a dict display."""
        code = self._entry.__code__
        cells = [f"{name!r}: {self._frame.prefix}cell_{name}.cell_contents" for name in self._cells]
        return [f"{name!r}: {name}" for name in _parameter_names(code)] + cells

    def _parameters(self) -> str:
        """The parameters of the frame, as the source of a ``def`` has them."""
        code = self._entry.__code__
        names = list(_parameter_names(code))
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
        entry, prefix = self._entry, self._frame.prefix
        lines = [f"def {prefix}make({', '.join(names)}):", f"  def {prefix}direct({parameters}):"]
        lines += [*(f"    {line}" for line in body), f"  return {prefix}direct"]
        made: dict[str, Any] = {}
        code = compile("\n".join(lines) + "\n", f"<graphcap {name} of {entry.__qualname__}>", "exec")
        exec(code, entry.__globals__, made)
        function = made[f"{prefix}make"](**names)
        function.__name__, function.__qualname__ = entry.__name__, entry.__qualname__
        return cast(FunctionType, function)


def _parameter_names(code: CodeType) -> tuple[str, ...]:
    stars = bool(code.co_flags & 0x04) + bool(code.co_flags & 0x08)
    return code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + stars]


def _needed(lines: Sequence[Line], needed: set[int], droppable: set[int]) -> list[str]:
    """The lines that make what is needed or do more than that; ``needed`` grows by what these need."""
    kept = []
    for line in reversed(lines):
        can_go = line.is_pure or id(line.makes) in droppable
        if not can_go or id(line.makes) in needed:
            kept.append(line.text)
            needed |= {id(value) for value in line.uses}
    return kept[::-1]
