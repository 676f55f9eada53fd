"""Sort the nodes of a Dynamo graph into groups: what is compiled and captured, what is cut out, what runs live.

The result is a list of :class:`Group` in program order. Order never changes, so effects happen in the order in which
the program wrote them. Three sorts of node are in no group and are copied into every piece that needs them:
attributes, arithmetic on sizes, and context managers (autocast), see split.py.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import fx

from graphcap.compiler import nodes, private
from graphcap.compiler.rules import SplitRules, captured_when, never_captured, op_name, undeclared_writes
from graphcap.compiler.symbols import SizeSymbols
from graphcap.cudagraph import Capture

#: A live group with fewer operations than this is run as it is: compiling it would cost more than it saves.
MIN_COMPILED_LIVE_OPS = 4

#: Context managers as Dynamo writes them: one call to enter, one to leave.
CONTEXT_ENTER = {"_enter_autocast", "_enter_inference_mode"}
CONTEXT_EXIT = {"_exit_autocast", "_exit_inference_mode"}

_TRANSFORM_ENTER = {"_vmap_increment_nesting", "_jvp_increment_nesting", "_grad_increment_nesting"}
_TRANSFORM_EXIT = {"_vmap_decrement_nesting", "_jvp_decrement_nesting", "_grad_decrement_nesting"}

#: Calls that torch's own modules leave in a graph and that compute nothing.
_NO_OPS = {"_log_api_usage_once"}

#: Calls without tensors and without a result that act on nothing after them: checks of sizes, preparations of vmap.
_SET_NOTHING = {
    *("_assert_scalar.default", "sym_constrain_range.default", "sym_constrain_range_for_size.default"),
    *("_check", "_check_is_size", "lazy_load_decompositions"),
    *_TRANSFORM_ENTER,  # what they set ends within the span that is kept whole
    *_TRANSFORM_EXIT,
}

#: Questions about a tensor's layout. They read no data.
_SIZE_QUERIES = {"size", "stride", "numel", "dim", "storage_offset", "sym_size", "sym_stride", "sym_numel"}


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


@dataclass
class Group:
    """Neighbouring nodes with the same verdict; they become one piece."""

    verdict: Verdict
    nodes: list[fx.Node]
    reasons: list[str] = field(default_factory=list)

    @property
    def reason(self) -> str:
        """The distinct reasons of its nodes in one line."""
        return "; ".join(dict.fromkeys(reason for reason in self.reasons if reason))


def partition(graph: fx.Graph, rules: SplitRules, sizes: SizeSymbols, device: torch.device | None) -> list[Group]:
    """Group the nodes of ``graph``.

    Args:
        graph: a Dynamo graph; calls that compute nothing are erased from it.
        rules: the split rules.
        sizes: the size symbols of this graph.
        device: where captures would happen; nodes that touch another device run live. ``None``: no device fits.
    """
    normalise(graph, sizes)
    judged = [(node, judge(node, rules, sizes, device)) for node in graph.nodes if not is_copied(node)]
    groups = _merge(_keep_spans_whole(_follow_producers(judged)))
    groups = _merge_groups([_demote_small(group) for group in groups])
    groups = _merge_groups(_fold_views(groups))
    return [*groups, *_returned_sizes(graph, sizes)]


def is_copied(node: fx.Node) -> bool:
    """Nodes that belong to no group: every piece that needs one gets its own copy."""
    return node.op in ("placeholder", "output", "get_attr") or is_context(node) or is_pure_scalar(node)


def is_context(node: fx.Node) -> bool:
    """Entering or leaving a context manager that lasts over several nodes, such as autocast."""
    return getattr(node.target, "__name__", "") in CONTEXT_ENTER | CONTEXT_EXIT


def is_pure_scalar(node: fx.Node) -> bool:
    """Arithmetic on sizes that reads no tensor."""
    return node.op == "call_function" and nodes.is_scalar(node) and not _touches_tensors(node)


def judge(node: fx.Node, rules: SplitRules, sizes: SizeSymbols, device: torch.device | None) -> Verdict:
    """The verdict on one node."""
    if _sets_state(node):
        return Verdict(False, Capture.FULL, "sets state for the operations after it")
    split = rules.match(node)
    refused = never_captured(node) or sizes.outside_key(node) or _foreign_device(node, device)
    if refused:
        simple = split is None and never_captured(node) is None and _foreign_device(node, device) is None
        return Verdict(simple or _needs_inductor(node), Capture.NEVER, refused)
    condition = captured_when(node)
    if condition:
        return Verdict(False, *condition)
    if split:
        return Verdict(_needs_inductor(node), Capture.FULL, split)
    if writes := undeclared_writes(node):
        reason = f"{op_name(node.target)} writes {', '.join(writes)}, which its schema does not say"
        return Verdict(False, Capture.ALWAYS, reason)
    return CAPTURED


def _needs_inductor(node: fx.Node) -> bool:
    """Higher-order ops such as flex_attention are meant for Inductor; run as they are they materialise everything."""
    return isinstance(node.target, torch._ops.HigherOrderOperator)


def _touches_tensors(node: fx.Node) -> bool:
    return any(nodes.tensors_of(arg) for arg in node.all_input_nodes)


def _foreign_device(node: fx.Node, device: torch.device | None) -> str | None:
    """A node that makes or reads tensors of another device cannot be in this device's graphs."""
    if device is None or device.type == "cpu":
        return None
    involved = [t for n in (node, *node.all_input_nodes) for t in nodes.tensors_of(n)]
    foreign = {str(t.device) for t in involved if t.device != device and t.dim() > 0}
    made_elsewhere = {str(t.device) for t in nodes.tensors_of(node) if t.device != device}
    return f"touches {', '.join(sorted(foreign | made_elsewhere))}" if foreign or made_elsewhere else None


def normalise(graph: fx.Graph, sizes: SizeSymbols) -> None:
    """Put every ``getitem`` of a tuple right behind the tuple; erase no-ops; read sizes from the inputs, not from
    tensors.

    Everything that may have an effect stays where it is.
    """
    for node in list(graph.nodes):
        if isinstance(nodes.value_of(node), (tuple, list)):
            for user in reversed(list(node.users)):
                if user.target is operator.getitem:
                    node.append(user)
    for node in graph.nodes:
        itself = _returned_argument(node)
        if itself is not None:
            node.replace_all_uses_with(itself)
    for node in reversed(list(graph.nodes)):
        known = _known_size(node, sizes)
        if known is not None:
            node.replace_all_uses_with(known) if isinstance(known, fx.Node) else _inline(node, known)
        no_op = is_pure_scalar(node) or _is_size_query(node) or getattr(node.target, "__name__", "") in _NO_OPS
        if not node.users and no_op:
            graph.erase_node(node)


def _returned_argument(node: fx.Node) -> fx.Node | None:
    """The argument that a torch function returns itself (``x.add_(1)``): one tensor under two names enters no piece."""
    value = nodes.value_of(node)
    if not isinstance(value, torch.Tensor) or not node.op.startswith("call_") or never_captured(node):
        return None
    return next((argument for argument in node.all_input_nodes if nodes.value_of(argument) is value), None)


def _is_size_query(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", node.target) in _SIZE_QUERIES and nodes.is_scalar(node)


def _known_size(node: fx.Node, sizes: SizeSymbols) -> fx.Node | int | None:
    """What ``x.size(0)`` comes to without ``x``: an input of the graph, or a number."""
    value = nodes.value_of(node)
    if not _is_size_query(node) or isinstance(value, (tuple, list)):
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return sizes.bound_by.get(private.symbol_expression(value))


def _inline(node: fx.Node, value: int) -> None:
    for user in list(node.users):
        user.args = fx.map_arg(user.args, lambda a: value if a is node else a)
        user.kwargs = fx.map_arg(user.kwargs, lambda a: value if a is node else a)


def _sets_state(node: fx.Node) -> bool:
    """A torch call without tensors and without a result (choosing SDPA backends): it acts on what follows it."""
    if node.op != "call_function" or node.users or getattr(node.target, "__name__", "") in _SET_NOTHING:
        return False
    return nodes.value_of(node) is None and not _touches_tensors(node)


Judged = list[tuple[fx.Node, Verdict]]


def _follow_producers(judged: Judged) -> Judged:
    """``getitem`` belongs to the operation whose tuple it takes apart, so that no tuple crosses a border."""
    verdicts = dict(judged)
    for node, _ in judged:
        producer = node.args[0] if node.target is operator.getitem else None
        if isinstance(producer, fx.Node) and isinstance(nodes.value_of(producer), (tuple, list)):
            verdicts[node] = verdicts.get(producer, verdicts[node])
    return list(verdicts.items())


def _keep_spans_whole(judged: Judged) -> Judged:
    """Between entering and leaving a function transform (vmap and the like) a graph must not be cut."""
    depth, start = 0, 0
    result = list(judged)
    for index, (node, _) in enumerate(judged):
        name = getattr(node.target, "__name__", "")
        if name in _TRANSFORM_ENTER:
            start = index if depth == 0 else start
            depth += 1
        elif name in _TRANSFORM_EXIT:
            depth -= 1
            if depth == 0:
                span = judged[start : index + 1]
                verdict = _strictest(v for _, v in span)
                result[start : index + 1] = [(n, verdict) for n, _ in span]
    return result


def _strictest(verdicts: Iterable[Verdict]) -> Verdict:
    order = [Capture.ALWAYS, Capture.FULL, Capture.UNIFORM, Capture.UNIFORM_SINGLE, Capture.NEVER]
    return max(verdicts, key=lambda v: (order.index(v.capture), not v.compiled), default=CAPTURED)


def _merge(judged: Judged) -> list[Group]:
    return _merge_groups([Group(verdict, [node], [verdict.reason]) for node, verdict in judged])


def _merge_groups(groups: list[Group]) -> list[Group]:
    """Neighbours with the same verdict become one group."""
    merged: list[Group] = []
    for group in groups:
        if merged and _same(merged[-1].verdict, group.verdict):
            merged[-1].nodes.extend(group.nodes)
            merged[-1].reasons.extend(group.reasons)
        else:
            merged.append(group)
    return merged


def _same(a: Verdict, b: Verdict) -> bool:
    return a.compiled == b.compiled and a.capture is b.capture


def _demote_small(group: Group) -> Group:
    """A handful of live operations costs less as it is than as a compiled piece."""
    if group.verdict.capture is Capture.ALWAYS or not group.verdict.compiled or any(map(_needs_inductor, group.nodes)):
        return group
    if sum(not nodes.is_scalar(node) for node in group.nodes) >= MIN_COMPILED_LIVE_OPS:
        return group
    return Group(Verdict(False, group.verdict.capture, group.verdict.reason), group.nodes, group.reasons)


def _fold_views(groups: list[Group]) -> list[Group]:
    """A captured group that only makes views launches nothing: it joins the cut group beside it."""
    folded: list[Group] = []
    for index, group in enumerate(groups):
        neighbours = [g for g in (folded[-1:] + groups[index + 1 : index + 2]) if not g.verdict.compiled]
        if group.verdict.capture is Capture.ALWAYS and neighbours and all(map(_is_view, group.nodes)):
            folded.append(Group(neighbours[0].verdict, group.nodes, []))
        else:
            folded.append(group)
    return folded


def _is_view(node: fx.Node) -> bool:
    """Whether everything that a node returns shares memory with what it reads, and it writes nothing."""
    name = getattr(node.target, "__name__", str(node.target))
    if name in ("setitem", "iadd", "isub", "imul") or (name.endswith("_") and not name.endswith("__")):
        return False
    read = {private.storage_id(t) for arg in node.all_input_nodes for t in nodes.tensors_of(arg)}
    return all(private.storage_id(t) in read for t in nodes.tensors_of(node))


def _returned_sizes(graph: fx.Graph, sizes: SizeSymbols) -> list[Group]:
    """Sizes that the graph returns are computed by a last group of their own."""
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    returned = [node for node in output.all_input_nodes if is_pure_scalar(node)]
    if not returned:
        return []
    outside = [reason for node in returned if (reason := sizes.outside_key(node))]
    verdict = Verdict(False, Capture.NEVER if outside else Capture.ALWAYS, "; ".join(outside))
    return [Group(verdict, returned, outside)]
