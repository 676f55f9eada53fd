"""A copy of a graph that can be put back into the very same ``fx.Graph`` object.

The graph belongs to Inductor's module, so a failed pass cannot be undone by handing back another graph.
"""

from __future__ import annotations

from torch import fx


class Snapshot:
    """What ``graph`` looked like when the snapshot was taken. Node metadata is copied shallowly."""

    def __init__(self, graph: fx.Graph) -> None:
        """Copy every node of ``graph``."""
        self._graph = graph
        self._copy = fx.Graph()
        self._names: list[str] = [node.name for node in graph.nodes]
        _copy_nodes(graph, self._copy)

    def restore(self) -> None:
        """Make the graph what it was: same ops, order, arguments, names and metadata, on new node objects."""
        nodes = list(self._graph.nodes)
        for node in nodes:  # half-rewritten arguments go first, so that no node has users left
            node.args, node.kwargs = (), {}
        for node in reversed(nodes):
            self._graph.erase_node(node)
        _copy_nodes(self._copy, self._graph)
        for node, name in zip(self._graph.nodes, self._names, strict=True):
            node.name = name  # the graph's namespace still holds the old node's name and would append a number


def graph_text(graph: fx.Graph) -> str:
    """The graph as Python code with shapes, strides, dtypes and devices, for people to read and compare."""
    return graph.python_code("self", verbose=True, include_stride=True, include_device=True).src


def _copy_nodes(source: fx.Graph, target: fx.Graph) -> None:
    copies: dict[fx.Node, fx.Node] = {}
    for node in source.nodes:
        copies[node] = target.node_copy(node, copies.__getitem__)
