"""Runs a pass where it runs in real life: on the graph that AOTAutograd hands to Inductor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table

from graphcap.passes import GraphPass, PassResult


@dataclass
class Rewritten:
    """A function after one pass: what the pass said, the graph it left, what the graph then computes."""

    result: PassResult
    graph: fx.Graph
    num_nodes_before: int
    outputs: Any

    def count(self, target: object) -> int:
        return sum(node.target is target for node in self.graph.nodes)


Rewrite = Callable[..., Rewritten]


@pytest.fixture
def rewrite() -> Rewrite:
    """``rewrite(a_pass, fn, *inputs)``: trace ``fn`` to a post-grad graph, run the pass, lint, run the graph."""

    def run(a_pass: GraphPass, fn: Callable[..., Any], *inputs: torch.Tensor) -> Rewritten:
        seen: list[tuple[PassResult, fx.Graph, int]] = []

        def compile_graph(module: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
            num_nodes = len(module.graph.nodes)
            result = a_pass(module.graph)
            module.graph.lint()
            module.recompile()
            seen.append((result, module.graph, num_nodes))
            return module.forward

        backend = aot_autograd(fw_compiler=compile_graph, decompositions=select_decomp_table())
        with torch.no_grad():
            outputs = torch.compile(fn, backend=backend, fullgraph=True)(*inputs)
        assert len(seen) == 1
        return Rewritten(*seen[0], outputs)

    return run
