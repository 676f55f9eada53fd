"""The guards of a graph: all of them, and those that are about the arguments of a call. Private API of torch, checked
on 2.11 and 2.13.

Dynamo keeps the guards of a graph as a tree, whose nodes are the places that they look at: ``L['args'][0]``,
``L['self']._modules['fc']``, ``G['__import_torch']``. ``guards="sealed"`` does not look at the state of modules and at
globals on every call. What it evaluates is a copy of the tree without those branches; the leaves at the root (grad
mode, autocast, the default device, ...) and the guards on sizes stay.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Sequence, Set
from typing import Any

from torch import is_inference_mode_enabled

from graphcap.compiler.frontend import plain_call, step_source
from graphcap.compiler.frontend.guard_tree import NO_ALIAS, OF_A_TENSOR, SHARED, Node, nodes_of, one_line
from graphcap.compiler.frontend.same_layout import SameLayout
from graphcap.native.objects import Question

_NAMED = re.compile(r"L\['(\w+)'\]")


class Guards:
    """The guards of one graph, without keeping them alive: they belong to Dynamo, which drops them on a reset."""

    __slots__ = ("_reference",)

    def __init__(self, manager: Any) -> None:
        self._reference = weakref.ref(manager)

    def belong_to(self, manager: Any) -> bool:
        """Whether these are the guards of ``manager``."""
        return self._reference() is manager

    @property
    def are_dropped(self) -> bool:
        """Whether Dynamo has forgotten the graph: a reset, or something that it guarded by identity has died."""
        manager = self._reference()
        return manager is None or manager.cache_entry is None

    def __call__(self, f_locals: dict[str, Any]) -> bool:
        """Whether the graph may serve a frame that begins with these variables; what the frame hook asks first."""
        manager = self._reference()
        return manager is not None and manager.cache_entry is not None and manager.root.check(f_locals)

    def failing(self, f_locals: dict[str, Any]) -> str:
        """The first guard that fails, with the line of the user's code that it is for; ``""`` where none does."""
        manager = self._reference()
        if manager is None or manager.cache_entry is None:
            return ""
        answer = manager.check_verbose(f_locals)
        return "" if answer.result else one_line("; ".join(answer.verbose_code_parts) or "a guard without a text")

    def nodes(self, state: Set[str]) -> list[Node]:
        """The places that they look at; none when Dynamo has dropped them, or for a torch whose trees cannot be copied.

        Args:
            state: names of the frame's variables that hold state: modules, cells. Other variables are arguments.
        """
        manager = self._reference()
        if manager is None or not hasattr(manager.root, "clone_manager"):
            return []
        return list(nodes_of(manager.root, (), {f"L['{name}']" for name in state} | {"G"}))

    def without(self, left_out: Set[str], nodes: Sequence[Node]) -> SomeGuards:
        """All but those on the places left out, where nothing else leads through these. Those at the root of the tree,
        on torch's modes and on several arguments, stay.

        Args:
            left_out: places, by Dynamo's names.
            nodes: all places.

        Raises:
            LookupError: Dynamo has dropped them.
        """
        manager = self._reference()
        if manager is None:
            raise LookupError("Dynamo has dropped the guards")
        looked_at = [node for node in nodes if node.leaves and node.source not in left_out]
        kept = {each for node in looked_at for each in (*node.above, node.source)}
        return SomeGuards(self._reference, manager.root.clone_manager(lambda node: node.get_source() in kept))

    def same_layout(self) -> SameLayout:
        """For which arguments they are going to be known to hold, where all that look at arguments see layouts."""
        return SameLayout([], self._reference)

    def of_arguments(self, state: Set[str], fetched: Set[str], proved: Set[str]) -> ArgumentGuards | None:
        """The part that is evaluated on every call of a sealed target.

        Args:
            state: as for :meth:`nodes`.
            fetched: what the graph gets anew on every call, by Dynamo's names: guarded wherever it comes from.
            proved: what it gets that is proved to be the object of the last call.

        Returns:
            ``None`` when Dynamo has dropped the guards, or for a torch whose trees cannot be copied.
        """
        nodes, manager = self.nodes(state), self._reference()
        if not nodes or manager is None:
            return None
        kept = _kept(nodes, fetched, proved)
        return ArgumentGuards(
            self._reference,
            manager.root.clone_manager(lambda node: node.get_source() in kept),
            tuple(match for node in nodes if node.source in kept and (match := node.argument())),
            [text for node in nodes if node.source not in kept for text in node.texts()],
            asked_of_step(nodes),
            _ambient([node for node in nodes if node.source in kept], state),
        )


class SomeGuards:
    """Guards without some."""

    __slots__ = ("_check", "_inference", "_reference")

    def __init__(self, reference: weakref.ref[Any], root: Any) -> None:
        self._reference = reference
        self._check: Callable[[dict[str, Any]], bool] = root.check
        self._inference: bool | None = None

    def __call__(self, f_locals: dict[str, Any]) -> bool:
        """As for :class:`Guards`, the others aside; false when Dynamo has dropped the graph."""
        manager = self._reference()
        if manager is None or manager.cache_entry is None:
            return False
        inference = is_inference_mode_enabled()
        if inference is not self._inference:
            # Guards on tensors, also those of a copy, go by the dispatch keys that the tree they were made for has met
            # at its last evaluation. (What else decides about these keys is guarded itself, or no plain call.)
            manager.root.check(f_locals)
            self._inference = inference
        return self._check(f_locals)

    def others_evaluated(self) -> None:
        """Dynamo may have evaluated the guards since, under other circumstances."""
        self._inference = None


class ArgumentGuards(SomeGuards):
    """Guards without those on state.

    Attributes:
        unaliased: expressions over the frame's variables: tensors that must not be the same object as one that is
            proved to be that of the last call. This is the caller's to check.
        unchecked: the guards that are left out.
        of_step: the inputs of the step that the graph relies on: those that it has, and those that it has not.
        same_layout: for which arguments they are known to hold; ``None`` where some see more of an argument than that.
    """

    __slots__ = ("of_step", "same_layout", "unaliased", "unchecked")

    def __init__(
        self,
        reference: weakref.ref[Any],
        root: Any,
        unaliased: tuple[str, ...],
        unchecked: list[str],
        of_step: tuple[tuple[str, ...], tuple[str, ...]],
        ambient: list[Question] | None,
    ) -> None:
        super().__init__(reference, root)
        self.unaliased = unaliased
        self.unchecked = unchecked
        self.of_step = of_step
        self.same_layout = None if ambient is None else SameLayout(ambient, reference)


def _kept(nodes: Sequence[Node], fetched: Set[str], proved: Set[str]) -> set[str]:
    """The places that are looked at on every call.

    All but state; of that every tensor that is not proved, as the graph would take whatever is there.
    """
    kept = {node.source for node in nodes if not node.is_state}
    kept |= {n.source for n in nodes if n.source in fetched or (n.has(OF_A_TENSOR) and n.source not in proved)}
    # Guards between several places see all of these or none. That two tensors are not the same object is checked
    # otherwise where one is proved and the other an argument, as this would bring back every buffer.
    deep = any(n.source in kept and n.has(NO_ALIAS) and not n.argument() for n in nodes)
    shared = SHARED if deep else SHARED - {NO_ALIAS}
    between = {id(leaf) for n in nodes if n.source in kept for leaf in n.leaves if type(leaf).__name__ in shared}
    kept |= {node.source for node in nodes if any(id(leaf) in between for leaf in node.leaves)}
    return kept | {place for node in nodes if node.source in kept for place in node.above}


def asked_of_step(nodes: Sequence[Node]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The inputs of the step that guards rely on: those that it has, and those that it has not."""
    present = dict.fromkeys(name for node in nodes if (name := step_source.input_name(node.source)))
    asked = dict.fromkeys(name for node in nodes if (name := step_source.whether_step_has(node.source)))
    has_not = {step_source.whether_step_has(node.source) for node in nodes if node.has("FALSE_MATCH")}
    present |= dict.fromkeys(name for name in asked if name not in has_not)
    return tuple(present), tuple(name for name in asked if name in has_not)


def _ambient(kept: Sequence[Node], state: Set[str]) -> list[Question] | None:
    """Those on torch's modes, as questions, where all others see only the layout of tensor arguments, and constants;
    ``None`` where some see more."""
    ambient: list[Question] = []
    for node in kept:
        if not node.above:
            for leaf in node.leaves:
                text = step_source.named_as_argument(" ".join(leaf.verbose_code_parts()))
                named = set(_NAMED.findall(text))
                if "G[" in text or named & state or not callable(leaf):
                    return None
                if not named and (question := plain_call.question_of(leaf)) is not None:
                    ambient.append(question)  # the others compare sizes
        elif not node.leads_to_step() and not node.is_of_argument():
            return None
    return ambient
