"""Cut a Dynamo graph into pieces: one small graph module per group, with explicit inputs and outputs.

A piece takes tensors and sizes positionally and returns a tuple. It is self-contained: attributes, arithmetic on
sizes and the context managers that were open around its nodes are copied into it. Every symbol that its inputs
mention is an input of its own, so that Inductor can tell each size (torch-level splitters do the same).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import fx

from graphcap.compiler import nodes, private
from graphcap.compiler.partition import CONTEXT_ENTER, CONTEXT_EXIT, Group, is_copied
from graphcap.compiler.symbols import SizeSymbols, symbols_in
from graphcap.compiler.verdict import Verdict


@dataclass
class Piece:
    """One part of the split graph.

    Attributes:
        name: ``"piece_3"``, in execution order.
        verdict: how it runs; see :class:`~graphcap.compiler.verdict.Verdict`.
        reason: why it is not captured, ``""`` otherwise.
        module: the piece as a graph module; its output is a flat tuple.
        inputs: the nodes of the whole graph that it reads, one per placeholder, in order.
        outputs: the nodes of the whole graph that it produces for others, in order.
        nodes: the nodes of the whole graph that it consists of.
    """

    name: str
    verdict: Verdict
    reason: str
    module: fx.GraphModule
    inputs: list[fx.Node]
    outputs: list[fx.Node]
    nodes: list[fx.Node]

    @property
    def module_path(self) -> str:
        """The module that made its first node: ``"model.layers.3.self_attn"``."""
        return next((path for node in self.nodes if (path := nodes.module_path(node))), "")

    @property
    def source(self) -> str:
        """``file:line`` of its first node with a user source."""
        return next((line for node in self.nodes if (line := nodes.source_line(node))), "")


def split(gm: fx.GraphModule, groups: Sequence[Group], sizes: SizeSymbols) -> list[Piece]:
    """Make one piece per group, in order."""
    contexts = dict(_open_contexts(gm.graph))
    return [_PieceBuilder(gm, group, contexts, sizes).build(f"piece_{i}") for i, group in enumerate(groups)]


def _open_contexts(graph: fx.Graph) -> Iterator[tuple[fx.Node, tuple[fx.Node, ...]]]:
    """For every node the context managers that are open where it stands, outermost first."""
    open_now: list[fx.Node] = []
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "")
        if name in CONTEXT_ENTER:
            open_now.append(node)
        elif name in CONTEXT_EXIT:
            open_now.remove(node.args[0])
        yield node, tuple(open_now)


class _PieceBuilder:
    """Builds the graph module of one group."""

    def __init__(
        self, gm: fx.GraphModule, group: Group, contexts: dict[fx.Node, tuple[fx.Node, ...]], sizes: SizeSymbols
    ) -> None:
        self.gm, self.group, self.contexts, self.sizes = gm, group, contexts, sizes
        self.members = set(group.nodes)
        self.graph = fx.Graph()
        self.copies: dict[fx.Node, fx.Node] = {}

    def build(self, name: str) -> Piece:
        inputs = self._inputs()
        for node in inputs:
            copy = self.graph.placeholder(node.name)
            copy.meta = dict(node.meta)
            self.copies[node] = copy
        self._copy_members()
        outputs = [node for node in self.group.nodes if any(user not in self.members for user in node.users)]
        output = self.graph.output(tuple(self.copies[node] for node in outputs))
        output.meta["example_value"] = tuple(nodes.value_of(node) for node in outputs)
        self.graph.lint()
        module = fx.GraphModule(self.gm, self.graph, class_name=name)
        return Piece(name, self.group.verdict, self.group.reason, module, inputs, outputs, self.group.nodes)

    def _inputs(self) -> list[fx.Node]:
        """Outer nodes in the order of first use, sizes last; each symbol that they mention is among them."""
        found: dict[fx.Node, None] = {}
        for node in self.group.nodes:
            for argument in self._outer_arguments(node):
                found.setdefault(argument)
        present = {private.symbol_expression(nodes.value_of(node)) for node in found}
        for node in (*found, *self.group.nodes):  # in order of mention, which twins share
            for symbol in symbols_in([nodes.value_of(node)]):
                if symbol not in present and symbol in self.sizes.bound_by:
                    found.setdefault(self.sizes.bound_by[symbol])
        tensors = [node for node in found if not nodes.is_scalar(node)]
        return tensors + [node for node in found if nodes.is_scalar(node)]

    def _outer_arguments(self, node: fx.Node) -> Iterator[fx.Node]:
        for argument in node.all_input_nodes:
            if argument in self.members:
                continue
            if is_copied(argument) and argument.op != "placeholder":
                yield from self._outer_arguments(argument)
            else:
                yield argument
        for entered in self.contexts.get(node, ()):
            yield from (a for a in entered.all_input_nodes if a.op == "placeholder")

    def _copy_members(self) -> None:
        entered: list[tuple[fx.Node, fx.Node]] = []
        for node in self.group.nodes:
            wanted = self.contexts.get(node, ())
            while [outer for outer, _ in entered] != list(wanted[: len(entered)]):
                self._leave(entered.pop())
            for outer in wanted[len(entered) :]:
                entered.append((outer, self._copy(outer)))
            self._copy(node)
        while entered:
            self._leave(entered.pop())

    def _leave(self, entered: tuple[fx.Node, fx.Node]) -> None:
        outer, copy = entered
        leave = next(user for user in outer.users if getattr(user.target, "__name__", "") in CONTEXT_EXIT)
        self.graph.call_function(leave.target, (copy,))  # type: ignore[arg-type]

    def _copy(self, node: fx.Node) -> fx.Node:
        for argument in node.all_input_nodes:
            if argument not in self.copies:
                self._copy(argument)
        copy = self.graph.node_copy(node, self.copies.__getitem__)
        copy.target = private.resolve_op_overload(copy.target)
        if not self._is_entered(node):
            self.copies[node] = copy
        return copy

    @staticmethod
    def _is_entered(node: fx.Node) -> bool:
        """A context may be entered several times in one piece, so its copy is never reused."""
        return getattr(node.target, "__name__", "") in CONTEXT_ENTER
