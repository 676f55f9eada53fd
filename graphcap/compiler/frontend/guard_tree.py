"""The tree in which Dynamo keeps the guards of a graph. Private API of torch, checked on 2.11 and 2.13.

Its nodes are the places that the guards look at: ``L['args'][0]``, ``L['self']._modules['fc']``,
``G['__import_torch']``. Each has leaves, the guards on what is found there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Any

from graphcap.compiler.frontend import step_source

#: Leaves of the tree, by class.
OF_A_TENSOR, NO_ALIAS = "TENSOR_MATCH", "NO_TENSOR_ALIASING"
#: Leaves that belong to several nodes at once.
SHARED = frozenset({NO_ALIAS, "OBJECT_ALIASING", "STORAGE_OVERLAPPING", "SYMBOLIC_SHAPE_GUARD"})

#: Leaves that see of an argument only what :mod:`~graphcap.compiler.frontend.same_layout` compares.
_OF_A_LAYOUT = frozenset(
    {
        OF_A_TENSOR, NO_ALIAS, "DIMENSION_DYNAMIC_MARKING_GUARD", "DYNAMIC_INDICES", "NO_HASATTR", "TYPE_MATCH",
        "ID_MATCH", "NONE_MATCH", "TRUE_MATCH", "FALSE_MATCH", "EQUALS_MATCH", "LENGTH_CHECK", "DICT_LENGTH",
    }
)  # fmt: skip

#: An argument itself, or an item of ``*args`` or ``**kwargs``.
_ARGUMENT = re.compile(r"L\['(?P<name>\w+)'\](?P<item>\[\d+\]|\['\w+'\])?")


@dataclass(frozen=True, slots=True)
class Node:
    """One place that guards look at."""

    source: str
    above: tuple[str, ...]  #: the places on the way to it, from the root
    leaves: tuple[Any, ...]
    is_state: bool

    def has(self, kind: str) -> bool:
        return any(type(leaf).__name__ == kind for leaf in self.leaves)

    def kinds(self) -> frozenset[str]:
        """Its leaves by class, without those that see Dynamo's marks on a tensor."""
        return frozenset(type(leaf).__name__ for leaf in self.leaves if not is_about_a_mark(leaf))

    def sees_layout(self) -> bool:
        """Whether its guards see no more than a tensor's layout, Dynamo's marks on it, or a constant."""
        return all(type(leaf).__name__ in _OF_A_LAYOUT or is_about_a_mark(leaf) for leaf in self.leaves)

    def is_of_argument(self) -> bool:
        """Whether it is an argument or an input of the step, and its guards see no more than that."""
        if self.is_state or not self.sees_layout():
            return False
        of_step = step_source.input_name(self.source) or step_source.whether_step_has(self.source)
        return bool(of_step or _ARGUMENT.fullmatch(self.source))

    def leads_to_step(self) -> bool:
        """Whether it is on the way to an input of the step, and a part of graphcap."""
        return step_source.leads_to_step(self.source)

    def argument(self) -> str:
        """The expression for an argument that must not be another tensor of the call; ``""`` for anything else."""
        match = None if self.is_state or not self.has(NO_ALIAS) else _ARGUMENT.fullmatch(self.source)
        if match is not None:
            return f"{match['name']}{match['item'] or ''}"
        return step_source.expression(self.source) if self.has(NO_ALIAS) else ""

    def texts(self) -> Iterator[str]:
        """What its guards say, but for `training`, which is looked at on every call."""
        if not self.source.endswith(".training"):
            for leaf in self.leaves:
                yield from map(one_line, leaf.verbose_code_parts() if not self._repeats(leaf) else ())

    def _repeats(self, leaf: Any) -> bool:
        return type(leaf).__name__ in SHARED  # told by every place that it belongs to


def nodes_of(manager: Any, above: tuple[str, ...], state: Set[str], is_state: bool = False) -> Iterator[Node]:
    """A node and all below it; what is below one whose source is in ``state`` is state."""
    source = manager.get_source()
    is_state = (is_state or source in state) and not step_source.is_of_step(source)
    yield Node(source, above, tuple(manager.get_leaf_guards()), is_state)
    below = list(manager.get_child_managers())
    if hasattr(manager, "get_key_value_managers"):
        below += [each for pair in manager.get_key_value_managers().values() for each in pair]
    for each in below:
        if each is not None:
            yield from nodes_of(each, (*above, source), state, is_state)


def is_about_a_mark(leaf: Any) -> bool:
    """``((getattr(L['x'], '_dynamo_shape_ids', None) == {...}) if hasattr(...) else True)``: torch 2.11 has such."""
    texts = leaf.verbose_code_parts()
    return type(leaf).__name__ == "LAMBDA_GUARD" and bool(texts) and all("'_dynamo_" in text for text in texts)


def one_line(text: str) -> str:
    """A text of Dynamo's without its line breaks."""
    return re.sub(r"\s+", " ", text).strip()
