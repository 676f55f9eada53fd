"""What a user would call each input of a graph."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from graphcap.compiler import nodes, private
from graphcap.compiler.frontend.entry import parameter_source
from graphcap.compiler.frontend.step_source import named_as_argument

_NAME = "graphcap_input_name"


def name_inputs(graph: fx.Graph, owner: Any) -> None:
    """Give every placeholder its name, for :func:`input_name`.

    Args:
        graph: a Dynamo graph.
        owner: the ``self`` of the traced frame. A module's frame takes ``*args``; its forward knows what they are
            called.
    """
    for node in graph.nodes:
        if node.op == "placeholder":
            source = named_as_argument(private.source_name(node))
            if isinstance(owner, nn.Module):
                source = parameter_source(source, owner.forward)
            node.meta[_NAME] = nodes.readable_source(source) or node.name


def input_name(node: fx.Node) -> str:
    """``"input_ids"``, ``"model.layers.0.mlp.up_proj.weight"``, ``"input_ids.size().0"``, ``"step.seq_lens"``."""
    return str(node.meta.get(_NAME) or nodes.readable_source(private.source_name(node)) or node.name)
