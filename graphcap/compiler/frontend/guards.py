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
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any

from torch import is_inference_mode_enabled

from graphcap.compiler.frontend import plain_call, step_source
from graphcap.compiler.frontend.same_layout import SameLayout
from graphcap.native.objects import Question

#: Leaves of the tree, by class.
_OF_A_TENSOR, _NO_ALIAS = "TENSOR_MATCH", "NO_TENSOR_ALIASING"
#: Leaves that belong to several nodes at once.
_SHARED = frozenset({_NO_ALIAS, "OBJECT_ALIASING", "STORAGE_OVERLAPPING", "SYMBOLIC_SHAPE_GUARD"})

#: Leaves that see of an argument only what :mod:`~graphcap.compiler.frontend.same_layout` compares.
_OF_A_LAYOUT = frozenset(
    {
        _OF_A_TENSOR, _NO_ALIAS, "DIMENSION_DYNAMIC_MARKING_GUARD", "DYNAMIC_INDICES", "NO_HASATTR", "TYPE_MATCH",
        "ID_MATCH", "NONE_MATCH", "TRUE_MATCH", "FALSE_MATCH", "EQUALS_MATCH", "LENGTH_CHECK", "DICT_LENGTH",
    }
)  # fmt: skip

#: An argument itself, or an item of ``*args`` or ``**kwargs``.
_ARGUMENT = re.compile(r"L\['(?P<name>\w+)'\](?P<item>\[\d+\]|\['\w+'\])?")
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
        return "" if answer.result else _one_line("; ".join(answer.verbose_code_parts) or "a guard without a text")

    def of_arguments(self, state: Set[str], fetched: Set[str], proved: Set[str]) -> ArgumentGuards | None:
        """The part that is evaluated on every call of a sealed target.

        Args:
            state: names of the frame's variables that hold state: modules, cells. Other variables are arguments.
            fetched: what the graph gets anew on every call, by Dynamo's names: guarded wherever it comes from.
            proved: what it gets that is proved to be the object of the last call.

        Returns:
            ``None`` when Dynamo has dropped the guards, or for a torch whose trees cannot be copied.
        """
        manager = self._reference()
        if manager is None or not hasattr(manager.root, "clone_manager"):
            return None
        nodes = list(_nodes(manager.root, (), {f"L['{name}']" for name in state} | {"G"}))
        kept = _kept(nodes, fetched, proved)
        return ArgumentGuards(
            self._reference,
            manager.root.clone_manager(lambda node: node.get_source() in kept),
            tuple(match for node in nodes if node.source in kept and (match := node.argument())),
            [text for node in nodes if node.source not in kept for text in node.texts()],
            _asked_of_step(nodes),
            _ambient([node for node in nodes if node.source in kept], state),
        )


class ArgumentGuards:
    """Guards without those on state.

    Attributes:
        unaliased: expressions over the frame's variables: tensors that must not be the same object as one that is
            proved to be that of the last call. This is the caller's to check.
        unchecked: the guards that are left out.
        of_step: the inputs of the step that the graph relies on: those that it has, and those that it has not.
        same_layout: for which arguments they are known to hold; ``None`` where some see more of an argument than that.
    """

    __slots__ = ("_check", "_inference", "_reference", "of_step", "same_layout", "unaliased", "unchecked")

    def __init__(
        self,
        reference: weakref.ref[Any],
        root: Any,
        unaliased: tuple[str, ...],
        unchecked: list[str],
        of_step: tuple[tuple[str, ...], tuple[str, ...]],
        ambient: list[Question] | None,
    ) -> None:
        self._reference = reference
        self._check: Callable[[dict[str, Any]], bool] = root.check
        self._inference: bool | None = None
        self.unaliased = unaliased
        self.unchecked = unchecked
        self.of_step = of_step
        self.same_layout = None if ambient is None else SameLayout(ambient, reference)

    def __call__(self, f_locals: dict[str, Any]) -> bool:
        """As for :class:`Guards`, state aside; false when Dynamo has dropped the graph."""
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


@dataclass(frozen=True, slots=True)
class _Node:
    """One place that guards look at."""

    source: str
    above: tuple[str, ...]  #: the places on the way to it, from the root
    leaves: tuple[Any, ...]
    is_state: bool

    def has(self, kind: str) -> bool:
        return any(type(leaf).__name__ == kind for leaf in self.leaves)

    def sees_layout(self) -> bool:
        """Whether its guards see no more than a tensor's layout, Dynamo's marks on it, or a constant."""
        return all(type(leaf).__name__ in _OF_A_LAYOUT or _is_about_a_mark(leaf) for leaf in self.leaves)

    def is_of_argument(self) -> bool:
        """Whether it is an argument or an input of the step, and its guards see no more than that."""
        if self.is_state or not self.sees_layout():
            return False
        of_step = step_source.input_name(self.source) or step_source.whether_step_has(self.source)
        return bool(of_step or _ARGUMENT.fullmatch(self.source))

    def argument(self) -> str:
        """The expression for an argument that must not be another tensor of the call; ``""`` for anything else."""
        match = None if self.is_state or not self.has(_NO_ALIAS) else _ARGUMENT.fullmatch(self.source)
        if match is not None:
            return f"{match['name']}{match['item'] or ''}"
        return step_source.expression(self.source) if self.has(_NO_ALIAS) else ""

    def texts(self) -> Iterator[str]:
        """What its guards say, but for `training`, which is looked at on every call."""
        if not self.source.endswith(".training"):
            for leaf in self.leaves:
                yield from map(_one_line, leaf.verbose_code_parts() if not self._repeats(leaf) else ())

    def _repeats(self, leaf: Any) -> bool:
        return type(leaf).__name__ in _SHARED  # told by every place that it belongs to


def _nodes(manager: Any, above: tuple[str, ...], state: Set[str], is_state: bool = False) -> Iterator[_Node]:
    source = manager.get_source()
    is_state = (is_state or source in state) and not step_source.is_of_step(source)
    yield _Node(source, above, tuple(manager.get_leaf_guards()), is_state)
    below = list(manager.get_child_managers())
    if hasattr(manager, "get_key_value_managers"):
        below += [each for pair in manager.get_key_value_managers().values() for each in pair]
    for each in below:
        if each is not None:
            yield from _nodes(each, (*above, source), state, is_state)


def _kept(nodes: Sequence[_Node], fetched: Set[str], proved: Set[str]) -> set[str]:
    """The places that are looked at on every call.

    All but state; of that every tensor that is not proved, as the graph would take whatever is there.
    """
    kept = {node.source for node in nodes if not node.is_state}
    kept |= {n.source for n in nodes if n.source in fetched or (n.has(_OF_A_TENSOR) and n.source not in proved)}
    # Guards between several places see all of these or none. That two tensors are not the same object is checked
    # otherwise where one is proved and the other an argument, as this would bring back every buffer.
    deep = any(n.source in kept and n.has(_NO_ALIAS) and not n.argument() for n in nodes)
    shared = _SHARED if deep else _SHARED - {_NO_ALIAS}
    between = {id(leaf) for n in nodes if n.source in kept for leaf in n.leaves if type(leaf).__name__ in shared}
    kept |= {node.source for node in nodes if any(id(leaf) in between for leaf in node.leaves)}
    return kept | {place for node in nodes if node.source in kept for place in node.above}


def _asked_of_step(nodes: Sequence[_Node]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    present = dict.fromkeys(name for node in nodes if (name := step_source.input_name(node.source)))
    asked = dict.fromkeys(name for node in nodes if (name := step_source.whether_step_has(node.source)))
    has_not = {step_source.whether_step_has(node.source) for node in nodes if node.has("FALSE_MATCH")}
    present |= dict.fromkeys(name for name in asked if name not in has_not)
    return tuple(present), tuple(name for name in asked if name in has_not)


def _ambient(kept: Sequence[_Node], state: Set[str]) -> list[Question] | None:
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
        elif not step_source.leads_to_step(node.source) and not node.is_of_argument():
            return None
    return ambient


def _is_about_a_mark(leaf: Any) -> bool:
    """``((getattr(L['x'], '_dynamo_shape_ids', None) == {...}) if hasattr(...) else True)``: torch 2.11 has such."""
    texts = leaf.verbose_code_parts()
    return type(leaf).__name__ == "LAMBDA_GUARD" and bool(texts) and all("'_dynamo_" in text for text in texts)


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()
