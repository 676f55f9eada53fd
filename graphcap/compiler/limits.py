"""How large a size without an example may become in the compiled pieces, so that they may index with 32 bits.

For a size that the trace knows nothing about Inductor must assume the worst and computes every index in 64 bits, which
costs a decode step several percent on a GPU. A bound that no batch reaches in practice takes that away. Dynamo guards
it, so that a call beyond it is traced again, this time without a bound; where the guard is not there, the pieces run as
they are, without Inductor: right, and slower.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from graphcap.compiler import nodes, private
from graphcap.compiler.symbols import SizeSymbols
from graphcap.cudagraph import Constant, InputSpec, Step

_MOST_ELEMENTS = 2**30  #: of any tensor within the bound: half of what 32 bits index, for what Inductor adds to a graph
_BOUNDS = [2**power for power in range(20, 9, -1)]  #: from about a million rows down to a thousand


def bound_sizes(graph: fx.Graph, sizes: SizeSymbols) -> dict[str, int]:
    """Bound the sizes that have no example, before anything is compiled.

    Args:
        graph: a Dynamo graph.
        sizes: of it. Only a size that is alone in the key is bounded: a product with another may be anything.

    Returns:
        The bound of each symbol; empty where there is none to be had.
    """
    unbacked = [symbol for symbol in sizes.key if private.is_unbacked(symbol)]
    if len(sizes.key) != 1 or len(unbacked) != 1:
        return {}
    (symbol,) = unbacked
    tensors = [tensor for node in graph.nodes for tensor in nodes.tensors_of(node)]
    spans = {span for tensor in tensors if (span := _span(tensor)) is not None and span.free_symbols == {symbol}}
    bound = next((b for b in _BOUNDS if all(span.xreplace({symbol: b}) <= _MOST_ELEMENTS for span in spans)), None)
    mode = private.fake_mode_of(tensors)
    if bound is None or mode is None or not private.bound_symbol(mode, symbol, bound):
        return {}
    return {str(symbol): bound}


def _span(tensor: torch.Tensor) -> Any:
    """The elements of a tensor as an expression; ``None`` where they are a number."""
    return private.symbol_expression(tensor.numel())


def within_bounds(
    run: Callable[..., Any],
    bounds: Mapping[str, int],
    inputs: Sequence[InputSpec],
    steps: Sequence[Step],
    outputs: Sequence[int | Constant],
) -> Callable[..., Any]:
    """The live function, or for a call beyond a bound the same steps without compiled code."""
    position = next((index for index, spec in enumerate(inputs) if spec.symbol in bounds), None)
    if position is None:
        return run
    bound = bounds[inputs[position].symbol or ""]

    def bounded(*args: Any) -> Any:
        return run(*args) if args[position] <= bound else _as_they_are(steps, outputs, args)

    return bounded


def _as_they_are(steps: Sequence[Step], outputs: Sequence[int | Constant], args: Sequence[Any]) -> tuple[Any, ...]:
    values: dict[int, Any] = dict(enumerate(args))
    for step in steps:
        results = (step.eager or step.fn)(*[values[slot] for slot in step.reads])
        values.update(zip(step.writes, results, strict=True))
    return tuple(each.value if isinstance(each, Constant) else values[each] for each in outputs)
