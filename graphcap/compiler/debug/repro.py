"""A piece as a program of its own: ``python piece_0.repro.py`` runs it eager and compiled on random inputs.

The graph becomes Python source, sizes the values that the first call had. The program needs torch and graphcap; a piece
that calls operators or functions of the user's says what to import.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphcap.compiler import nodes
from graphcap.compiler.debug.graph_source import class_sources
from graphcap.compiler.debug.repro_inputs import arguments, inputs_of, is_literal, sizes_used
from graphcap.compiler.rules import op_name
from graphcap.compiler.split import Piece
from graphcap.config import Config

#: Settings that decide what code a piece becomes; the others are about capture, the disk or reporting.
OPTIONS = ("disable_passes", "inductor_compile_config")

_OWN_NAMESPACES = {"aten", "prims", "prim", "graphcap", "higher_order", "inductor", "_c10d_functional"}

_TEMPLATE = '''"""{title}, eager against compiled on random inputs.

{about}
Run it with plain Python: --seed and --tolerance are its options, the exit status is 0 when both agree.
Integers are 0 or 1, so that they are valid as indices; those that say where something is written are distinct.{remarks}
"""

import sys

{imports}

from graphcap.compiler.debug.compare import distinct, main, tensor
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
    inputs = inputs_of(piece.module)
    made = [each for each in inputs if each.is_made]
    return _TEMPLATE.format(
        title=title,
        about=" | ".join(filter(None, (piece.verdict.kind, piece.reason, piece.module_path, piece.source))),
        remarks=_remarks(piece),
        imports="\n".join(imports),
        check=_custom_op_check(piece.module),
        classes="\n\n\n".join(classes),
        inputs="\n".join(f"        {each.literal},  # x[{i}]: {each.name}" for i, each in enumerate(made)),
        arguments=arguments(inputs),
        name=piece.name,
        dynamic={index: each.dynamic for index, each in enumerate(made) if each.dynamic},
        options=_options(config),
        autocast=_autocast(),
    )


def holds_tensors(piece: Piece) -> bool:
    """Whether there is anything to compare; arithmetic on sizes has nothing that Inductor would compile."""
    return any(nodes.tensors_of(node) for node in piece.module.graph.nodes)


def _remarks(piece: Piece) -> str:
    lines = []
    if used := sizes_used(piece.module):
        lines.append(f"Sizes of the first call: {used}. They are read off the tensors, so that they can stay dynamic.")
    if not piece.verdict.compiled:
        lines.append("In the model this piece runs as it is. Here it goes through Inductor all the same.")
    return "".join(f"\n{line}" for line in lines)


def _options(config: Config) -> dict[str, Any]:
    """The settings that matter to a piece, as far as they can be written down. A piece is not split again."""
    chosen = {name: value for name, value in config.to_dict().items() if name in OPTIONS and is_literal(value)}
    return {**chosen, "compiler": "inductor", "splitting_ops": [], "cache": False, "cudagraph_mode": "NONE"}


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
