"""When nothing of ours should touch a graph, and what runs instead."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from graphcap.compiler import nodes, private
from graphcap.compiler.region import Region
from graphcap.config import CompilationMode, Config

log = logging.getLogger(__name__)

GRAD_MODE = "an output needs grad: the graph runs through Inductor with autograd, uncaptured"
#: The same where pieces are not to go through Inductor.
GRAD_MODE_EAGER = "an output needs grad: the graph runs eager (compiler='eager'), uncaptured"

_warned: set[str] = set()


def reason_to_bypass(gm: fx.GraphModule, example_inputs: Sequence[Any], config: Config) -> str:
    """Why this graph does not go through our pipeline; ``""`` when it does."""
    if config.enforce_eager:
        return f"enforce_eager ({config.origin('enforce_eager')})"
    if config.compilation_mode is not CompilationMode.PIECEWISE:
        return f"compilation_mode={config.compilation_mode.name} ({config.origin('compilation_mode')})"
    if needs_grad(gm, example_inputs):
        return GRAD_MODE_EAGER if config.compiler == "eager" else GRAD_MODE
    if any(node.op == "call_module" for node in gm.graph.nodes):
        return "the graph calls modules (torch._dynamo.config.inline_inbuilt_nn_modules is off)"
    reshaped = next((node for node in gm.graph.nodes if nodes.changes_form_in_place(node)), None)
    if reshaped is not None:
        # Dynamo recorded one form per tensor, that after it: a piece before it would be compiled for a wrong one.
        return f"{reshaped.target} changes the form of a tensor in place ({nodes.source_line(reshaped)})"
    return ""


def needs_grad(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> bool:
    """Whether autograd would record this graph: something in it requires grad, and autograd is on or is switched on."""
    required = any(isinstance(t, torch.Tensor) and t.requires_grad for t in example_inputs)
    if not required and not any(node.target == "requires_grad_" for node in gm.graph.nodes):
        return False
    switched_on = any(n.target is torch._C._set_grad_enabled and n.args == (True,) for n in gm.graph.nodes)
    return torch.is_grad_enabled() or switched_on


def run_bypass(gm: fx.GraphModule, example_inputs: Sequence[Any], region: Region) -> Callable[..., Any]:
    """The callable for a graph that is not ours: plain eager where that was asked, else Inductor with autograd."""
    config = region.config
    if region.bypass in (GRAD_MODE, GRAD_MODE_EAGER) and region.function not in _warned:
        _warned.add(region.function)
        warnings.warn(
            f"graphcap: {region.function} runs under grad mode and is not captured. For inference, call it under "
            "torch.no_grad() or torch.inference_mode().",
            stacklevel=2,
        )
    if config.enforce_eager or config.compilation_mode is CompilationMode.NONE or config.compiler == "eager":
        return gm.forward
    try:
        patches = dict(config.inductor_compile_config)
        compiled: Callable[..., Any] = private.inductor_with_autograd(gm, example_inputs, patches)
        return compiled
    except Exception as error:
        if config.compilation_mode is CompilationMode.STOCK_TORCH_COMPILE or private.restarts_trace(error):
            raise
        log.warning("%s: Inductor failed too, the graph runs eager: %s", region.name, error)
        region.notes.append(f"Inductor failed, runs eager: {error}")
        return gm.forward
