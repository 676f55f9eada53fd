"""A piece as a program of its own: ``python piece_0.repro.py`` runs it eager and compiled on random inputs.

The graph becomes Python source, sizes the values that the first call had. The program needs torch and graphcap; a piece
that calls operators or functions of the user's says what to import.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphcap.compiler import nodes, private
from graphcap.compiler.debug.graph_source import NotReproducible, class_sources, tensor_literal
from graphcap.compiler.rules import op_name
from graphcap.compiler.split import Piece
from graphcap.config import Config

#: Settings that decide what code a piece becomes; the others are about capture, the disk or reporting.
OPTIONS = ("disable_passes", "inductor_compile_config")

_OWN_NAMESPACES = {"aten", "prims", "prim", "graphcap", "higher_order", "inductor", "_c10d_functional"}

_TEMPLATE = '''"""{title}, eager against compiled on random inputs.

{about}
Run it with plain Python: --seed and --tolerance are its options, the exit status is 0 when both agree.
Integers are 0 or 1, so that they are valid as indices.{remarks}
"""

import sys

{imports}

from graphcap.compiler.debug.compare import main, tensor
{check}

{classes}


def make_inputs():
    return [
{inputs}
    ]


def call(piece, *x):
    return piece({arguments})


if __name__ == "__main__":
    sys.exit(
        main(
            {name}(),
            call,
            make_inputs,
            dynamic={dynamic},
            options={options},
            autocast={autocast},
        )
    )
'''


@dataclass
class _Input:
    """One placeholder: how it is made, or, for a size that some tensor has, that tensor and its dim."""

    name: str
    literal: str
    dynamic: tuple[int, ...] = ()
    carrier: tuple[str, int] | None = None


def repro_source(title: str, piece: Piece, config: Config) -> str:
    """The program.

    Args:
        title: ``"piece_0 of forward_0"``.
        piece: the piece, whose placeholders carry fake values.
        config: how it was compiled.

    Raises:
        NotReproducible: for an input, attribute or function that cannot be written as Python source.
    """
    imports: dict[str, None] = {"import torch": None}
    classes = list(class_sources(piece.module, piece.name, imports))
    inputs = _inputs(piece.module)
    made = [each for each in inputs if each.carrier is None]
    return _TEMPLATE.format(
        title=title,
        about=" | ".join(filter(None, (piece.verdict.kind, piece.reason, piece.module_path, piece.source))),
        remarks=_remarks(piece),
        imports="\n".join(imports),
        check=_custom_op_check(piece.module),
        classes="\n\n\n".join(classes),
        inputs="\n".join(f"        {each.literal},  # x[{i}]: {each.name}" for i, each in enumerate(made)),
        arguments=_arguments(inputs, [each.name for each in made]),
        name=piece.name,
        dynamic={index: each.dynamic for index, each in enumerate(made) if each.dynamic},
        options=_options(config),
        autocast=_autocast(),
    )


def _remarks(piece: Piece) -> str:
    lines = []
    if used := _sizes_used(piece.module):
        lines.append(f"Sizes of the first call: {used}. They are read off the tensors, so that they can stay dynamic.")
    if not piece.verdict.compiled:
        lines.append("In the model this piece runs as it is. Here it goes through Inductor all the same.")
    return "".join(f"\n{line}" for line in lines)


def _options(config: Config) -> dict[str, Any]:
    """The settings that matter to a piece, as far as they can be written down. A piece is not split again."""
    chosen = {name: value for name, value in config.to_dict().items() if name in OPTIONS and _is_literal(value)}
    return {**chosen, "compiler": "inductor", "splitting_ops": [], "cache": False, "cudagraph_mode": "NONE"}


def _is_literal(value: Any) -> bool:
    try:
        return bool(ast.literal_eval(repr(value)) == value)
    except (ValueError, SyntaxError):
        return False


def _autocast() -> str:
    on = [f"{d!r}: {torch.get_autocast_dtype(d)}" for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)]
    return "{" + ", ".join(on) + "}"


def _custom_op_check(module: fx.GraphModule) -> str:
    """Lines that tell which operators must be registered first, ``""`` when torch and graphcap bring them all."""
    names = {op_name(node.target) for node in module.graph.nodes if node.op == "call_function"}
    own = sorted(name for name in names if name.count("::") == 1 and name.partition("::")[0] not in _OWN_NAMESPACES)
    if not own:
        return ""
    lines = ["", "# Custom operators: import the module that registers them here.", f"for op in {own}:"]
    lines += ['    namespace, name = op.split("::")', "    if not hasattr(getattr(torch.ops, namespace), name):"]
    lines += ['        sys.exit(f"{op} is not registered: import its module at the top of {__file__}")']
    return "\n".join(lines) + "\n"


# -- the inputs --------------------------------------------------------------------------------------------------------


def _placeholders(module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in module.graph.nodes if node.op == "placeholder"]


def _inputs(module: fx.GraphModule) -> list[_Input]:
    placeholders = _placeholders(module)
    carriers = _carriers(placeholders)
    return [_input(node, carriers) for node in placeholders]


def _carriers(placeholders: Sequence[fx.Node]) -> dict[Any, tuple[str, int]]:
    """For each symbol the name and dim of a tensor that has this size."""
    found: dict[Any, tuple[str, int]] = {}
    for node in placeholders:
        value = nodes.value_of(node)
        if isinstance(value, torch.Tensor):
            for dim, size in enumerate(value.shape):
                expression = private.symbol_expression(size)
                if expression is not None and expression.is_symbol:
                    found.setdefault(expression, (str(node.target), dim))
    return found


def _arguments(inputs: Sequence[_Input], made: Sequence[str]) -> str:
    """What ``call`` hands to the piece: its ``x`` in order, and sizes of them."""
    if len(made) == len(inputs):
        return "*x"
    places = ((each, made.index(each.carrier[0] if each.carrier else each.name)) for each in inputs)
    return ", ".join(f"x[{index}].size({each.carrier[1]})" if each.carrier else f"x[{index}]" for each, index in places)


def _input(node: fx.Node, carriers: dict[Any, tuple[str, int]]) -> _Input:
    name, value = str(node.target), nodes.value_of(node)
    if isinstance(value, torch.Tensor):
        symbolic = tuple(d for d, size in enumerate(value.shape) if private.symbol_expression(size) is not None)
        return _Input(name, tensor_literal(value), symbolic)
    if isinstance(value, torch.SymFloat):
        return _Input(name, "0.5")  # a float that changes between calls has no value that is worth recording
    expression = private.symbol_expression(value)
    if expression is not None:
        return _Input(name, str(private.size_hint(value)), carrier=carriers.get(expression))
    if _is_literal(value):
        return _Input(name, repr(value))
    raise NotReproducible(f"input {name} is a {type(value).__name__}")


def _sizes_used(module: fx.GraphModule) -> str:
    """``"s77 = 7, s21 = 12"``."""
    found: dict[str, int] = {}
    for node in _placeholders(module):
        value = nodes.value_of(node)
        for size in value.shape if isinstance(value, torch.Tensor) else (value,):
            if isinstance(size, torch.SymInt):
                found[str(private.symbol_expression(size))] = private.size_hint(size)
    return ", ".join(f"{symbol} = {value}" for symbol, value in sorted(found.items()))
