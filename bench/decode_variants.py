"""The variants of the lab decoder that ``decode.py`` times and ``startup.py`` starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import graphcap
from bench import graphcaps, handmade, models

Forward = Callable[..., Tensor]

HAND_FULL = "hand-made FULL"
HAND_PIECEWISE = "hand-made PIECEWISE"


@dataclass
class Group:
    """What the variants of one model and batch size share.

    Builders run in the order of ``variants``; two of them leave something for a later one.
    """

    model: models.Decoder
    batch: int
    device: torch.device
    graphcap_options: dict[str, Any]
    compiled: Forward | None = None
    loop: handmade.PiecewiseLoop | None = None
    variants: Mapping[str, Callable[[Group], Forward]] = field(default_factory=lambda: VARIANTS)

    def inputs(self, seed: int) -> tuple[Tensor, ...]:
        return models.decode_inputs(self.model.config, self.device, self.batch, seed)


def eager(group: Group) -> Forward:
    return group.model


def compile_default(group: Group) -> Forward:
    return torch.compile(models.share_tensors(group.model), dynamic=False)


def reduce_overhead(group: Group) -> Forward:
    return torch.compile(models.share_tensors(group.model), dynamic=False, mode="reduce-overhead")


def hand_full(group: Group) -> Forward:
    if group.compiled is None:
        group.compiled = compile_default(group)
    return handmade.full_graph(group.compiled, group.inputs(seed=0))


def captured_loop(group: Group) -> handmade.PiecewiseLoop:
    if group.loop is None:
        loop = handmade.PiecewiseLoop(group.model, group.inputs(seed=0))
        loop.capture(models.attention)
        group.loop = loop
    return group.loop


def hand_piecewise(group: Group) -> Forward:
    return captured_loop(group).step(torch.ops.lab.attention.default)


def hand_piecewise_direct(group: Group) -> Forward:
    """The same graphs, with the attention's Python function called without the dispatcher."""
    return captured_loop(group).step(models.attend)


def graphcap_options(group: Group, mode: str) -> dict[str, Any]:
    ops = ("lab::attention", "lab::capturable_attention")
    return {
        "cudagraph_mode": graphcap.CUDAGraphMode[mode],
        "outputs": "clone",
        "splitting_ops": ops,
        "capture_sizes": (group.batch,),
        **graphcaps.device_options(group.device),
        **group.graphcap_options,
    }


def model_for(group: Group, mode: str) -> models.Decoder:
    """A module of its own; for FULL its attention is declared capturable, under the op's second name."""
    model = models.share_tensors(group.model)
    if mode == "FULL":
        graphcap.register_op("lab::capturable_attention", capture="always")
        for layer in model.decoder_layers():
            layer.attention_op = models.capturable_attention
    return model


def graphcap_compile(mode: str) -> Callable[[Group], Forward]:
    """``graphcap.compile(model, ...)``, the decorator's path: one compilation serves every batch size."""
    return lambda group: graphcap.compile(model_for(group, mode), **graphcap_options(group, mode))


def graphcap_backend(mode: str) -> Callable[[Group], Forward]:
    """``torch.compile(model, backend="graphcap")``: static shapes, Dynamo's guards on every call."""

    def build(group: Group) -> Forward:
        options = graphcap_options(group, mode)
        return torch.compile(model_for(group, mode), backend=graphcaps.backend(), dynamic=False, options=options)

    return build


VARIANTS: dict[str, Callable[[Group], Forward]] = {
    "eager": eager,
    "torch.compile default": compile_default,
    "torch.compile reduce-overhead": reduce_overhead,
    HAND_FULL: hand_full,
    "graphcap FULL": graphcap_compile("FULL"),
    "graphcap FULL (backend)": graphcap_backend("FULL"),
    HAND_PIECEWISE: hand_piecewise,
    f"{HAND_PIECEWISE}, attention without dispatcher": hand_piecewise_direct,
    "graphcap PIECEWISE": graphcap_compile("PIECEWISE"),
    "graphcap PIECEWISE (backend)": graphcap_backend("PIECEWISE"),
}
