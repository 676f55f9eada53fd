"""Reading straight-line bytecode: what the lines do is what the code does, and what is not known is refused."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from graphcap.compiler.frontend.frame_code import Unreadable
from graphcap.compiler.frontend.frame_reader import read


def __compiled_fn_1(*args: Any) -> tuple[Any, ...]:
    return args[::-1]


def __resume_at_8(*args: Any) -> Any:
    return args


def make(**values: Any) -> SimpleNamespace:
    return SimpleNamespace(**values)


def run(fn: Callable[..., Any], *args: Any) -> Any:
    """What the lines read from ``fn`` do."""
    frame = read(fn.__code__)
    assert frame.output is not None
    assert frame.result is not None
    body = [line.text for line in frame.before]
    body.append(f"{frame.output.text} = {frame.graph}({', '.join(value.text for value in frame.arguments)})")
    body += [*(line.text for line in frame.after), f"return {frame.result.text}"]
    parameters = fn.__code__.co_varnames[: fn.__code__.co_argcount]
    source = "\n  ".join([f"def {frame.prefix}({', '.join(parameters)}):", *body])
    names = {**globals(), **frame.constants}
    exec(source, names)
    return names[frame.prefix](*args)


def nested(self, args):
    out = __compiled_fn_1(self._parameters["w"], args[0], args[-1].size)
    return (out[0], [out[1], None, 1.5], {"a": out[2], "b": True}, float("inf"))


def keyword_call(self, args):
    out = __compiled_fn_1(args[0])
    return make(first=out[0], second=make(third="x"))


def unpacked(self, args):
    first, second = __compiled_fn_1(args[0], args[1])
    return {"first": first, "second": second}


def written(self, args):
    out = __compiled_fn_1(args[0])
    self.last = out[0]
    self.seen["n"] = 3
    del self.seen["gone"]
    self.log.append(out[0])
    return out[0]


def filled_in_a_loop(self, args):
    out = __compiled_fn_1(args[0])
    for key, value in {"a": out[0], "b": 3}.items():
        self.seen[key] = value
    return self.seen


def constant_result(self, args):
    __compiled_fn_1(args[0])


def reassigned(self, args):
    value = args[0]
    out = __compiled_fn_1(value)
    value = out[0]
    args = [value, value]
    return (args, value)


@pytest.mark.parametrize("fn", [nested, keyword_call, unpacked, written, filled_in_a_loop, constant_result, reassigned])
def test_lines_do_what_the_code_does(fn: Callable[..., Any]) -> None:
    def subject() -> SimpleNamespace:
        return make(_parameters={"w": 7}, seen={"gone": 0}, log=[], last=None)

    args = (SimpleNamespace(size=3), SimpleNamespace(size=4))
    mine, theirs = subject(), subject()
    assert run(fn, mine, args) == fn(theirs, args)
    assert mine == theirs


def test_paths_lead_to_inputs_that_are_only_loaded() -> None:
    frame = read(nested.__code__)
    paths = [[value.step for value in argument.path()] for argument in frame.arguments]
    assert paths == [
        [None, ("attribute", "_parameters"), ("item", "w")],
        [None, ("item", 0)],
        [None, ("item", -1), ("attribute", "size")],
    ]
    assert frame.arguments[0].path()[0].name == "self"


def test_no_variable_is_taken_twice() -> None:
    def taken(v1, v2):
        out = __compiled_fn_1(v1, v2)
        return (out[0], out[1])

    assert read(taken.__code__).prefix != "v"
    assert run(taken, 1, 2) == (2, 1)


def breaks(self, args):
    out = __compiled_fn_1(args[0])
    return __resume_at_8(out[0])


def two_graphs(self, args):
    return __compiled_fn_1(__compiled_fn_1(args[0])[0])


def no_graph(self, args):
    return args[0]


def branches(self, args):
    return __compiled_fn_1(args[0]) if args else None


def loops(self, args):
    return [__compiled_fn_1(each) for each in args]


def carries(self, args):
    out = __compiled_fn_1(args[0])
    last = 0
    for each in out:
        last = (last, each)
    return last


def leaves(self, args):
    __compiled_fn_1(args[0])
    for each in args:
        return each
    return None


def used_after_its_loop(self, args):
    __compiled_fn_1(args[0])
    for each in args:
        self.log.append(each)
    return each


def nested_loops(self, args):
    __compiled_fn_1(args[0])
    for each in args:
        for inner in each:
            self.log.append(inner)


def branch_in_a_loop(self, args):
    __compiled_fn_1(args[0])
    for each in args:
        if each:
            self.log.append(each)


def graph_in_a_loop(self, args):
    for each in args:
        __compiled_fn_1(each)


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (carries, "next round"),
        (leaves, "several ends|RETURN"),
        (used_after_its_loop, "may not be set"),
        (nested_loops, "in a loop"),
        (branch_in_a_loop, "Dynamo's code has a"),
        (graph_in_a_loop, "in a loop"),
        (breaks, "graph break"),
        (two_graphs, "several graphs"),
        (no_graph, "no graph"),
        (branches, "Dynamo's code has a"),
        (loops, "Dynamo's code has a"),
    ],
)
def test_everything_else_is_refused(fn: Callable[..., Any], reason: str) -> None:
    with pytest.raises(Unreadable, match=reason):
        read(fn.__code__)


class Sizes:
    def size(self, *args: int) -> Any:
        return ("size", *args)

    def stride(self, *args: int) -> Any:
        return ("stride", *args)

    def storage_offset(self) -> Any:
        return "storage_offset"


def by_dynamos_functions(self, args):
    size = __import_utils.call_size(self, 0)  # noqa: F821 - a global of Dynamo's
    stride = __import_utils.call_stride(self, 1)  # noqa: F821
    offset = __import_utils.call_storage_offset(self)  # noqa: F821
    return __compiled_fn_1(size, stride, offset, args)


def test_functions_that_only_call_a_method_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are wrapped so that the frame hook does not see them; a call of the method does the same."""

    def refuse(*args: Any) -> None:
        raise AssertionError("called")

    refusing = SimpleNamespace(call_size=refuse, call_stride=refuse, call_storage_offset=refuse)
    monkeypatch.setitem(globals(), "__import_utils", refusing)
    assert run(by_dynamos_functions, Sizes(), 7) == (7, "storage_offset", ("stride", 1), ("size", 0))
