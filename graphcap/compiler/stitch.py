"""Sew compiled pieces together: the program for the graph runtime, and one flat Python function that runs it live.

The function is generated, so that nothing between two pieces is looked up twice, and so that it can be read in a dump.
It drops every value after its last use, as Python would in the original function.
"""

from __future__ import annotations

import keyword
import linecache
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from graphcap.compiler import nodes, private
from graphcap.compiler.dims import GraphDims
from graphcap.compiler.eager_functions import moves_on
from graphcap.compiler.inputs import input_name
from graphcap.compiler.limits import within_bounds
from graphcap.compiler.out_variants import out_function
from graphcap.compiler.pieces import CompiledPiece
from graphcap.compiler.rules import unproven
from graphcap.compiler.split import Piece
from graphcap.compiler.symbols import SizeSymbols
from graphcap.compiler.value_bounds import value_bounds
from graphcap.compiler.write_indices import write_index_inputs
from graphcap.cudagraph import Capture, Constant, InputKind, InputSpec, Program, Step


def build_program(
    name: str,
    graph: fx.Graph,
    pieces: Sequence[Piece],
    compiled: Sequence[CompiledPiece],
    examples: Sequence[Any],
    sizes: SizeSymbols,
    dims: GraphDims,
    bounds: Mapping[str, int],
) -> tuple[Program, str]:
    """Number every value that crosses a border, and generate the live function.

    Args:
        name: the region's name.
        graph: the whole graph; its placeholders are the inputs, its output names what to return.
        pieces: in execution order.
        compiled: for each piece the callable to run, and the positions of the inputs that it writes.
        examples: the first call's value of each placeholder.
        sizes: tells which scalars are part of the graph key.
        dims: what each size follows, and the dims that the user declared.
        bounds: the sizes up to which compiled code holds, by symbol.

    Returns:
        The program and the source of ``program.run``.
    """
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    slots = {node: index for index, node in enumerate(placeholders)}
    steps = []
    for piece, result in zip(pieces, compiled, strict=True):
        reads = tuple(slots[node] for node in piece.inputs)
        for node in piece.outputs:
            slots[node] = len(slots)
        steps.append(
            Step(
                name=piece.name,
                fn=result.call,
                reads=reads,
                writes=tuple(slots[node] for node in piece.outputs),
                mutates=tuple(reads[position] for position in result.mutates),
                capture=piece.verdict.capture,
                reason=piece.reason,
                symbols=dims.symbols(nodes.value_of(node) for node in (*piece.inputs, *piece.nodes)),
                unproven=tuple(dict.fromkeys(op for node in piece.nodes if (op := unproven(node)))),
                moves_on=any(map(moves_on, piece.nodes)),
                eager=result.plain,
                into=_out_function(piece, sizes),
            )
        )
    returned = next(node for node in reversed(graph.nodes) if node.op == "output").args[0]
    outputs = tuple(slots[v] if isinstance(v, fx.Node) else Constant(v) for v in _flat(returned))
    values = [nodes.value_of(v) if isinstance(v, fx.Node) else v for v in _flat(returned)]
    writing = {node for piece, result in zip(pieces, compiled, strict=True) if result.mutates for node in piece.nodes}
    indices, bounds_of = write_index_inputs(graph, writing), value_bounds(graph)
    inputs = tuple(
        _input_spec(node, example, sizes, dims, bounds_of.get(node), is_write_index=node in indices)
        for node, example in zip(placeholders, examples, strict=True)
    )
    comments = [f"{p.verdict.kind}{', ' + p.module_path if p.module_path else ''}" for p in pieces]
    source = live_source(name, inputs, steps, outputs, comments)
    run = within_bounds(compile_live(name, source, steps, outputs), bounds, inputs, steps, outputs)
    output_sizes = tuple(map(dims.sizes, values))
    return Program(name, inputs, tuple(steps), outputs, run, output_sizes, dims.largest, bounds), source


def _out_function(piece: Piece, sizes: SizeSymbols) -> Callable[..., Any] | None:
    """What writes the result of a piece that runs live where graphs read it; ``None`` where its size is not fixed."""
    if piece.verdict.capture is Capture.ALWAYS or any(map(sizes.outside_key, (*piece.inputs, *piece.nodes))):
        return None
    return out_function(piece.module)


def _flat(returned: Any) -> Sequence[Any]:
    return returned if isinstance(returned, (tuple, list)) else (returned,)


def _input_spec(
    node: fx.Node, example: Any, sizes: SizeSymbols, dims: GraphDims, value_bound: int | None, *, is_write_index: bool
) -> InputSpec:
    value = nodes.value_of(node)
    expression = private.symbol_expression(value)
    tensor = bool(nodes.tensors_of(node))
    kind = InputKind.SCALAR
    if tensor:
        kind = InputKind.STATIC if private.is_static_input(example) else InputKind.TENSOR
    return InputSpec(
        name=input_name(node),
        kind=kind,
        symbol=dims.text(expression) if expression is not None else None,
        in_key=not tensor and (expression is None or expression.free_symbols <= sizes.key),
        is_parameter=isinstance(example, torch.nn.Parameter),
        sizes=dims.sizes(value),
        strides=dims.strides(value),
        dim_names=dims.names.get(node, {}),
        is_write_index=is_write_index,
        value_bound=value_bound,
    )


def live_source(
    name: str,
    inputs: Sequence[InputSpec],
    steps: Sequence[Step],
    outputs: Sequence[int | Constant],
    comments: Sequence[str],
) -> str:
    """The flat function as text: one line per step, values named by slot, ``del`` after the last use."""
    names = _slot_names(inputs, steps)
    last_use = _last_uses(inputs, steps, outputs)
    lines = [f"def {identifier(name)}({', '.join(names[i] for i in range(len(inputs)))}):"]
    for index, (step, comment) in enumerate(zip(steps, comments, strict=True)):
        targets = "".join(f"{names[slot]}, " for slot in step.writes)
        call = f"{step.name}({', '.join(names[slot] for slot in step.reads)})"
        lines.append(f"    {targets + '= ' if targets else ''}{call}  # {comment}")
        dead = [names[slot] for slot in dict.fromkeys((*step.reads, *step.writes)) if last_use.get(slot) == index]
        if dead:
            lines.append(f"    del {', '.join(dead)}")
    values = [names[o] if isinstance(o, int) else f"constant_{i}" for i, o in enumerate(outputs)]
    lines.append(f"    return ({''.join(f'{value}, ' for value in values)})")
    return "\n".join(lines) + "\n"


def _slot_names(inputs: Sequence[InputSpec], steps: Sequence[Step]) -> dict[int, str]:
    names = {index: f"{identifier(spec.name)}_{index}" for index, spec in enumerate(inputs)}
    for step in steps:
        names.update({slot: f"v{slot}" for slot in step.writes})
    return names


def _last_uses(inputs: Sequence[InputSpec], steps: Sequence[Step], outputs: Sequence[int | Constant]) -> dict[int, int]:
    """For each slot worth dropping (no parameter, no number, not returned) the last step that touches it."""
    keep = {slot for slot, spec in enumerate(inputs) if spec.kind is not InputKind.TENSOR} | set(outputs)
    uses: dict[int, int] = {}
    for index, step in enumerate(steps):
        for slot in (*step.reads, *step.writes):
            uses[slot] = index
    return {slot: index for slot, index in uses.items() if slot not in keep}


def identifier(name: str) -> str:
    """A readable Python identifier for a user's name."""
    text = re.sub(r"\W+", "_", name).strip("_") or "arg"
    return f"_{text}" if text[0].isdigit() or keyword.iskeyword(text) else text


def compile_live(
    name: str, source: str, steps: Sequence[Step], outputs: Sequence[int | Constant]
) -> Callable[..., Any]:
    """The function whose text :func:`live_source` gives."""
    namespace: dict[str, Any] = {step.name: step.fn for step in steps}
    namespace.update({f"constant_{i}": o.value for i, o in enumerate(outputs) if isinstance(o, Constant)})
    filename = f"<graphcap {name}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)  # tracebacks show the source
    exec(compile(source, filename, "exec"), namespace)  # the source was generated above
    function: Callable[..., Any] = namespace[identifier(name)]
    return function
