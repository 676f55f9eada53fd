"""Residual add + RMSNorm, fused into ``torch.ops.graphcap.add_rms_norm``.

Matches what real models contain after decomposition, around one ``rsqrt``::

    new    = residual + x                          either operand order; used again later or not
    wide   = new.to(float32)                       absent in fp32
    scale  = rsqrt(wide.pow(2).mean(-1) + eps)     or wide * wide; any eps
    normed = wide * scale
    out    = weight * normed.to(dtype)             hand-written, Hugging Face Llama: rounds, then multiplies
    out    = (normed * weight).to(dtype)           F.rms_norm, torch.nn.RMSNorm: multiplies in fp32, then rounds

The two roundings differ, and the op keeps each (``weight_in_fp32``). The weight must be an input of the graph: Gemma's
``1 + weight`` is another op. A chain whose intermediate results are used elsewhere is not matched, since fusing it
would compute them twice.

A match is left as it was, and only reported, where the fused op would not be a gain or could not run: on devices
without our kernel, so that Inductor's own fusion is not blocked, for rows beyond the kernel's width, and for inputs
that are not contiguous (the op returns contiguous tensors, and later nodes rely on the strides they were traced with).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from graphcap.passes.base import GraphPass, PassResult
from graphcap.passes.kernels.add_rms_norm import DTYPES, MAX_HIDDEN, has_triton
from graphcap.passes.nodes import has_one_user, is_call, is_contiguous, only_user, value_of
from graphcap.passes.private import surely_equal
from graphcap.passes.sites import describe

aten = torch.ops.aten
CONVERT = torch.ops.prims.convert_element_type.default
OP = torch.ops.graphcap.add_rms_norm.default


class AddRmsNorm(GraphPass):
    """Replaces residual add + RMSNorm by one kernel that reads each row once."""

    name = "add_rms_norm"
    depends_on = (
        "graphcap.passes.kernels.add_rms_norm",
        "graphcap.passes.kernels.add_rms_norm_triton",
        "graphcap.passes.nodes",
        "graphcap.passes.private",
    )

    def __init__(self, rewrite_on: tuple[str, ...] = ("cuda",)) -> None:
        """Bind the device types on which matches are rewritten; on ``"cuda"`` Triton must be installed as well."""
        self.rewrite_on = rewrite_on
        # Part of the fingerprint: what the pass generates depends on it.
        self.triton = has_triton()

    def applies_to(self, device: torch.device) -> bool:
        """Whether the op has a kernel worth calling on ``device``."""
        return device.type in self.rewrite_on and (device.type != "cuda" or self.triton)

    def __call__(self, graph: fx.Graph) -> PassResult:
        """Rewrite every match for which nothing speaks against it."""
        sites, replaced = [], 0
        for scale in graph.find_nodes(op="call_function", target=aten.rsqrt.default):
            # Matched only now: the residual of this match may be a node that the previous rewrite put in.
            match = _match(scale)
            if match is None:
                continue
            reason = self._against(match)
            if reason is None:
                _replace(graph, match)
                replaced += 1
            sites.append(f"{match.site}: {'fused' if reason is None else f'left as it was: {reason}'}")
        return PassResult(self.name, matches=len(sites), replaced=replaced, sites=tuple(sites))

    def _against(self, match: Match) -> str | None:
        """Why the match stays as it was, or ``None``."""
        device = value_of(match.x).device
        hidden = value_of(match.x).shape[-1]
        if not self.applies_to(device):
            return f"no kernel of ours on {device.type}"
        if not isinstance(hidden, int) or not 1 <= hidden <= MAX_HIDDEN:
            return f"hidden size {hidden} is not between 1 and {MAX_HIDDEN}"
        if any(value_of(node).device != device for node in (match.residual, match.weight)):
            return "its inputs are on different devices"
        for label, node in (("x", match.x), ("residual", match.residual), ("weight", match.weight)):
            if not is_contiguous(value_of(node)):
                return f"{label} is not contiguous (strides {tuple(value_of(node).stride())})"
        return None


@dataclass(frozen=True, slots=True)
class Match:
    """One occurrence. ``chain`` holds its nodes from ``new`` to ``out``, in graph order."""

    x: fx.Node
    residual: fx.Node
    weight: fx.Node
    eps: float
    weight_in_fp32: bool
    new: fx.Node
    out: fx.Node
    chain: tuple[fx.Node, ...]

    @property
    def site(self) -> str:
        # The norm's own nodes first: its module and line say more than those of the add before it.
        return describe(self.chain[1:] + self.chain[:1])


def _match(scale: fx.Node) -> Match | None:
    """The pattern around one ``rsqrt``, read upwards to the add and downwards to the multiply with the weight."""
    upper = _match_mean_of_squares(scale)
    if upper is None:
        return None
    wide, eps, middle = upper
    new = wide.args[0] if wide.target is CONVERT else wide
    addends = _residual_add(new)
    if addends is None or value_of(wide).dtype != torch.float32:
        return None
    new, residual, x = addends

    normed = only_user(scale, aten.mul.Tensor)
    if normed is None or set(normed.args) != {wide, scale}:
        return None
    lower = _match_weight(normed, value_of(new).dtype)
    if lower is None:
        return None
    out, weight, weight_in_fp32, tail = lower
    if not surely_equal(value_of(weight).shape[0], value_of(new).shape[-1]):
        return None
    head = (new,) if wide is new else (new, wide)
    return Match(x, residual, weight, eps, weight_in_fp32, new, out, (*head, *middle, scale, normed, *tail))


def _match_mean_of_squares(scale: fx.Node) -> tuple[fx.Node, float, tuple[fx.Node, ...]] | None:
    """``rsqrt(mean(wide ** 2, -1, keepdim=True) + eps)``: ``wide``, ``eps`` and the nodes between."""
    shifted = scale.args[0]
    if not is_call(shifted, aten.add.Tensor, aten.add.Scalar) or shifted.kwargs or not has_one_user(shifted):
        return None
    mean, eps = shifted.args
    if not isinstance(eps, (int, float)) or not is_call(mean, aten.mean.dim) or not has_one_user(mean):
        return None
    squares, dims = mean.args[:2]
    keepdim = len(mean.args) == 3 and mean.args[2] is True
    if not is_call(squares, aten.pow.Tensor_Scalar, aten.mul.Tensor) or not has_one_user(squares):
        return None
    wide, power = squares.args
    if not isinstance(wide, fx.Node) or power not in ((2,) if squares.target is aten.pow.Tensor_Scalar else (wide,)):
        return None
    last = value_of(wide).dim() - 1
    if mean.kwargs or not keepdim or not isinstance(dims, (list, tuple)) or [*dims] not in ([-1], [last]):
        return None
    return wide, float(eps), (squares, mean, shifted)


def _match_weight(normed: fx.Node, dtype: torch.dtype) -> tuple[fx.Node, fx.Node, bool, tuple[fx.Node, ...]] | None:
    """From the normed fp32 row to the output in ``dtype``: output, weight, ``weight_in_fp32``, and the chain's nodes
    after ``normed``."""
    rounded = only_user(normed, CONVERT)
    if rounded is not None:  # rounds, then multiplies
        product, weight, upcast = _product_with_weight(rounded)
        # An upcast weight or an fp32 one would make the product fp32.
        if product is None or weight is None or {value_of(n).dtype for n in (rounded, weight, product)} != {dtype}:
            return None
        return product, weight, False, (rounded, *upcast, product)

    product, weight, upcast = _product_with_weight(normed)
    if product is None or weight is None or value_of(weight).dtype not in (dtype, torch.float32):
        return None
    if dtype == torch.float32:
        return product, weight, True, (*upcast, product)
    out = only_user(product, CONVERT)  # multiplies, then rounds
    if out is None or value_of(out).dtype != dtype:
        return None
    return out, weight, True, (*upcast, product, out)


def _product_with_weight(row: fx.Node) -> tuple[fx.Node | None, fx.Node | None, tuple[fx.Node, ...]]:
    """The single use of ``row``, as a factor of a vector that the graph gets as an input: product, vector, and the node
    that upcasts the vector to fp32 where there is one."""
    product = only_user(row, aten.mul.Tensor)
    factors = [arg for arg in product.args if arg is not row] if product is not None else []
    weight = factors[0] if len(factors) == 1 else None
    upcast: tuple[fx.Node, ...] = ()
    if is_call(weight, CONVERT) and value_of(weight).dtype == torch.float32:
        upcast, weight = (weight,), weight.args[0]
    if not isinstance(weight, fx.Node) or weight.op != "placeholder" or not isinstance(value_of(weight), torch.Tensor):
        return None, None, ()
    return (product, weight, upcast) if value_of(weight).dim() == 1 else (None, None, ())


def _residual_add(new: object) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """``a + b`` of two tensors of one shape and one supported dtype (no broadcast, no ``alpha``): the add, a and b."""
    if not is_call(new, aten.add.Tensor) or new.kwargs:
        return None
    left, right = new.args
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    shape, dtype = value_of(new).shape, value_of(new).dtype
    for value in (value_of(left), value_of(right)):
        if not isinstance(value, torch.Tensor) or value.dtype != dtype or len(value.shape) != len(shape):
            return None
        if not all(map(surely_equal, value.shape, shape)):
            return None
    return (new, left, right) if dtype in DTYPES and len(shape) > 0 else None


def _replace(graph: fx.Graph, match: Match) -> None:
    """Put the op where the add was: both its inputs and, being a placeholder, the weight exist there."""
    with graph.inserting_before(match.new):
        args = (match.x, match.residual, match.weight, match.eps, match.weight_in_fp32)
        pair = graph.call_function(OP, args)
        normed = graph.call_function(operator.getitem, (pair, 0))
        new = graph.call_function(operator.getitem, (pair, 1))
    pair.meta = {**match.out.meta, "val": (value_of(match.out), value_of(match.new))}
    normed.meta, new.meta = dict(match.out.meta), dict(match.new.meta)
    match.out.replace_all_uses_with(normed)
    match.new.replace_all_uses_with(new)
    for node in (*reversed(match.chain), new):
        if not node.users:
            graph.erase_node(node)
