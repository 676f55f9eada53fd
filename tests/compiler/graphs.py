"""Dynamo's graphs of small functions, and their pieces: what the tests of the compiler look at."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from graphcap.compiler.backend import devices_of, home_device
from graphcap.compiler.dims import read_dims
from graphcap.compiler.effects import mutated_inputs
from graphcap.compiler.partition import Group, partition
from graphcap.compiler.pieces import CompiledPiece
from graphcap.compiler.rules import SplitRules
from graphcap.compiler.split import Piece, split
from graphcap.compiler.stitch import build_program
from graphcap.compiler.symbols import SizeSymbols, analyse_sizes
from graphcap.cudagraph import Program

Look = Callable[[fx.GraphModule, Sequence[Any]], Any]


def in_backend(look: Look, fn: Callable[..., Any], *inputs: Any, **compile_options: Any) -> list[Any]:
    """What ``look(graph, example_inputs)`` returned for each graph that Dynamo makes of one call.

    It runs while Dynamo waits, as in a real compile: the shape environment is the trace's own and not frozen yet.
    """
    seen: list[Any] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        run = gm.forward
        seen.append(look(gm, example_inputs))
        return run

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(fn, backend=backend, **compile_options)(*inputs)
    return seen


def trace(fn: Callable[..., Any], *inputs: Any, **compile_options: Any) -> fx.GraphModule:
    """The one graph of ``fn(*inputs)``."""
    (gm,) = in_backend(lambda gm, _: gm, fn, *inputs, **compile_options)
    assert isinstance(gm, fx.GraphModule)
    return gm


def call_nodes(gm: fx.GraphModule, name: str) -> list[fx.Node]:
    """The calls whose node name starts with ``name``."""
    return [n for n in gm.graph.nodes if n.op in ("call_function", "call_method") and n.name.startswith(name)]


def groups_of(gm: fx.GraphModule, *, ops: Sequence[str] | None = None, rules: Sequence[Any] = ()) -> list[Group]:
    """Analyse and partition a graph as the backend does."""
    sizes = analyse_sizes(gm.graph)
    return partition(gm.graph, SplitRules.of(ops, rules), sizes, home_device(devices_of(gm.graph)))


def pieces_of(gm: fx.GraphModule, *, ops: Sequence[str] | None = None, rules: Sequence[Any] = ()) -> list[Piece]:
    """Analyse, partition and split a graph as the backend does."""
    sizes = analyse_sizes(gm.graph)
    return split(gm, partition(gm.graph, SplitRules.of(ops, rules), sizes, home_device(devices_of(gm.graph))), sizes)


def stitched(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    rules: Sequence[Any] = (),
    declared: Mapping[str, Any] | None = None,
) -> tuple[Program, str]:
    """The program of a graph whose pieces run as they are, and its source."""
    sizes: SizeSymbols = analyse_sizes(gm.graph)
    pieces = pieces_of(gm, rules=rules)
    compiled = [CompiledPiece(p.module.forward, mutated_inputs(p.module), "eager") for p in pieces]
    dims = read_dims(gm.graph, example_inputs, declared)
    return build_program("f_0", gm.graph, pieces, compiled, example_inputs, sizes, dims, {})


def kinds(groups_or_pieces: Sequence[Group | Piece]) -> list[str]:
    """``["captured", "eager", ...]`` in order."""
    return [each.verdict.kind for each in groups_or_pieces]


def piece_text(piece: Piece) -> str:
    """A piece as text that no torch version and no naming changes: values are numbered in order."""
    numbers: dict[fx.Node, str] = {}
    verdict = piece.verdict
    lines = [f"{piece.name} ({verdict.kind}, {verdict.capture.value})" + (f": {piece.reason}" if piece.reason else "")]
    fresh = itertools.count()
    for node in piece.module.graph.nodes:
        arguments = fx.map_arg((node.args, node.kwargs), lambda n: _Name(numbers[n]))
        numbers[node] = f"%{next(fresh)}"
        target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        value = node.meta.get("example_value")
        shape = tuple(value.shape) if isinstance(value, torch.Tensor) else ""
        if node.op == "placeholder":
            lines.append(f"  {numbers[node]} = input {shape}".rstrip())
        elif node.op == "output":
            lines.append(f"  return {arguments[0][0]}")
        else:
            kwargs = f" {dict(arguments[1])}" if arguments[1] else ""
            lines.append(f"  {numbers[node]} = {target}{tuple(arguments[0])}{kwargs} {shape}".rstrip())
    return _number_symbols("\n".join(lines))


def _number_symbols(text: str) -> str:
    """``s77`` is a hash of a name that torch may change: ``s0``, ``s1`` in order of mention."""
    numbers: dict[str, str] = {}
    return re.sub(r"\b[su]\d+\b", lambda m: numbers.setdefault(m[0], f"{m[0][0]}{len(numbers)}"), text)


class _Name(str):
    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)
