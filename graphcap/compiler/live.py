"""How a piece runs without Inductor: as flat Python, custom ops called directly where the dispatcher would add nothing.

A ``torch.library.custom_op`` costs a few microseconds in the dispatcher before its kernel's first line runs; at one
attention per layer that is a good part of a decode step. Its kernel is the very function that the dispatcher would
reach, so calling it directly is equivalent as long as nothing wants to see the call: grad mode, autocast, a dispatch
or function mode, functorch, the profiler. That is asked on every call; otherwise the call goes through the resolved
``OpOverload``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphcap.compiler import nodes, private


def live_function(piece: fx.GraphModule) -> Callable[..., Any]:
    """The callable for a piece that runs as it is: the piece's inputs positionally, a tuple of its outputs."""
    devices = {t.device.type for node in piece.graph.nodes for t in nodes.tensors_of(node)}
    if len(devices) != 1 or not all(map(private.is_plain_tensor, _tensors(piece))):
        return piece.forward
    graph = fx.Graph()
    output = graph.graph_copy(piece.graph, {})
    graph.output(output)
    for node in graph.nodes:
        if node.op == "call_function":
            node.target = direct(node.target, next(iter(devices)))
    forward: Callable[..., Any] = fx.GraphModule(piece, graph, class_name="live").forward
    return forward


def plain_function(piece: fx.GraphModule) -> Callable[..., Any] | None:
    """The piece's Python without its graph, which would keep every fake tensor of the trace; ``None`` where the code
    needs the module (it reads an attribute)."""
    if any(node.op in ("get_attr", "call_module") for node in piece.graph.nodes):
        return None
    code = getattr(piece.forward, "__func__", None)
    return functools.partial(code, None) if code is not None else None


def _tensors(piece: fx.GraphModule) -> list[torch.Tensor]:
    return [tensor for node in piece.graph.nodes for tensor in nodes.tensors_of(node)]


def direct(op: Any, device_type: str) -> Any:
    """A function that calls a custom op's kernel without the dispatcher where that is equivalent; else ``op`` itself.

    Of an ``@graphcap.eager`` function it is the user's own: what is around it serves traces, and costs a microsecond.
    """
    own = getattr(op, "_graphcap_eager", None)
    if own is not None and getattr(own, "__name__", "").isidentifier():
        return own
    found = private.custom_op_kernel(op, device_type)
    if found is None:
        return op
    kernel, is_disabled = found
    watched = private.call_is_watched

    def call(*args: Any, **kwargs: Any) -> Any:
        if is_disabled or watched(device_type):
            return op(*args, **kwargs)
        return kernel(*args, **kwargs)

    call.__name__ = f"direct_{op.__name__}".replace(".", "_")
    call.__module__ = __name__
    return call
