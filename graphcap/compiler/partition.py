"""Sort the nodes of a Dynamo graph into groups: what is compiled and captured, what is cut out, what runs live.

The result is a list of :class:`Group` in program order. Order never changes, so effects happen in the order in which
the program wrote them. Three sorts of node are in no group and are copied into every piece that needs them:
attributes, arithmetic on sizes, and context managers (autocast), see split.py. What may happen to one node is in
verdict.py.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import fx

from graphcap.compiler import nodes, private
from graphcap.compiler.normalise import normalise
from graphcap.compiler.rules import SplitRules
from graphcap.compiler.symbols import SizeSymbols
from graphcap.compiler.verdict import CAPTURED, TRANSFORM_ENTER, TRANSFORM_EXIT, Verdict, judge, needs_inductor
from graphcap.cudagraph import Capture

#: A live group with fewer operations than this is run as it is: compiling it would cost more than it saves.
MIN_COMPILED_LIVE_OPS = 4

#: Context managers as Dynamo writes them: one call to enter, one to leave.
CONTEXT_ENTER = {"_enter_autocast", "_enter_inference_mode"}
CONTEXT_EXIT = {"_exit_autocast", "_exit_inference_mode"}


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
    return node.op in ("placeholder", "output", "get_attr") or is_context(node) or nodes.is_pure_scalar(node)


def is_context(node: fx.Node) -> bool:
    """Entering or leaving a context manager that lasts over several nodes, such as autocast."""
    return getattr(node.target, "__name__", "") in CONTEXT_ENTER | CONTEXT_EXIT


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
        if name in TRANSFORM_ENTER:
            start = index if depth == 0 else start
            depth += 1
        elif name in TRANSFORM_EXIT:
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
    if group.verdict.capture is Capture.ALWAYS or not group.verdict.compiled or any(map(needs_inductor, group.nodes)):
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
    returned = [node for node in output.all_input_nodes if nodes.is_pure_scalar(node)]
    if not returned:
        return []
    outside = [reason for node in returned if (reason := sizes.outside_key(node))]
    verdict = Verdict(False, Capture.NEVER if outside else Capture.ALWAYS, "; ".join(outside))
    return [Group(verdict, returned, outside)]
