"""What may happen to one node of a Dynamo graph: whether it is compiled, whether a CUDA graph may hold it, why not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from graphcap.compiler import nodes
from graphcap.compiler.rules import SplitRules, captured_when, never_captured, op_name, undeclared_writes
from graphcap.compiler.symbols import SizeSymbols
from graphcap.cudagraph import Capture

#: Function transforms (vmap and the like) as Dynamo writes them: one call to enter, one to leave.
TRANSFORM_ENTER = {"_vmap_increment_nesting", "_jvp_increment_nesting", "_grad_increment_nesting"}
TRANSFORM_EXIT = {"_vmap_decrement_nesting", "_jvp_decrement_nesting", "_grad_decrement_nesting"}

#: Calls without tensors and without a result that act on nothing after them: checks of sizes, preparations of vmap.
_SET_NOTHING = {
    *("_assert_scalar.default", "sym_constrain_range.default", "sym_constrain_range_for_size.default"),
    *("_check", "_check_is_size", "lazy_load_decompositions"),
    *TRANSFORM_ENTER,  # what they set ends within the span that is kept whole
    *TRANSFORM_EXIT,
}


@dataclass(frozen=True)
class Verdict:
    """What may happen to one node.

    Attributes:
        compiled: whether it goes through Inductor.
        capture: whether a CUDA graph may hold it.
        reason: why not, or why it was cut out; ``""`` for an ordinary captured node.
    """

    compiled: bool
    capture: Capture
    reason: str = ""

    @property
    def kind(self) -> str:
        """``captured``, ``compiled`` (by Inductor, run live) or ``eager`` (run live as it is)."""
        if self.capture is Capture.ALWAYS:
            return "captured"
        return "compiled" if self.compiled else "eager"


CAPTURED = Verdict(True, Capture.ALWAYS)


def judge(node: fx.Node, rules: SplitRules, sizes: SizeSymbols, device: torch.device | None) -> Verdict:
    """The verdict on one node."""
    if _sets_state(node):
        return Verdict(False, Capture.FULL, "sets state for the operations after it")
    split = rules.match(node)
    refused = never_captured(node) or sizes.outside_key(node) or _foreign_device(node, device)
    if refused:
        simple = split is None and never_captured(node) is None and _foreign_device(node, device) is None
        return Verdict(simple or needs_inductor(node), Capture.NEVER, refused)
    condition = captured_when(node)
    if condition:
        return Verdict(False, *condition)
    if split:
        return Verdict(needs_inductor(node), Capture.FULL, split)
    if writes := undeclared_writes(node):
        reason = f"{op_name(node.target)} writes {', '.join(writes)}, which its schema does not say"
        return Verdict(False, Capture.ALWAYS, reason)
    return CAPTURED


def needs_inductor(node: fx.Node) -> bool:
    """Higher-order ops such as flex_attention are meant for Inductor; run as they are they materialise everything."""
    return isinstance(node.target, torch._ops.HigherOrderOperator)


def _foreign_device(node: fx.Node, device: torch.device | None) -> str | None:
    """A node that makes or reads tensors of another device cannot be in this device's graphs."""
    if device is None or device.type == "cpu":
        return None
    involved = [t for n in (node, *node.all_input_nodes) for t in nodes.tensors_of(n)]
    foreign = {str(t.device) for t in involved if t.device != device and t.dim() > 0}
    made_elsewhere = {str(t.device) for t in nodes.tensors_of(node) if t.device != device}
    return f"touches {', '.join(sorted(foreign | made_elsewhere))}" if foreign or made_elsewhere else None


def _sets_state(node: fx.Node) -> bool:
    """A torch call without tensors and without a result (choosing SDPA backends): it acts on what follows it."""
    if node.op != "call_function" or node.users or getattr(node.target, "__name__", "") in _SET_NOTHING:
        return False
    return nodes.value_of(node) is None and not nodes.touches_tensors(node)
