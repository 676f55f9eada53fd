"""Which guards on state hold as long as nobody writes to the dicts that lead to what they look at.

A guard on ``L['self']._modules['fc'].in_features`` looks at an object that dicts hold: those of the modules on the
way. As long as nobody has written to these since the guard held, and the modules have kept their classes and dicts, it
is the same object. For a constant that is all. Of a dict guards see its keys, of a tensor its layout and Dynamo's
marks, of another object its class: :class:`graphcap.native.fallback.StateCheck` looks at these. It is the same with
globals, and with code and defaults of functions. What else a guard may see or how else a place may be reached (lists,
properties, closures, classes) proves nothing, and is evaluated.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from graphcap import native
from graphcap.compiler.frontend import plain_call
from graphcap.compiler.frontend.guard_tree import NO_ALIAS, OF_A_TENSOR, SHARED, Node
from graphcap.compiler.frontend.statics import Entry, Step, walk

#: Leaves that see which object it is, and nothing of it.
_OF_AN_IDENTITY = frozenset(
    {"ID_MATCH", "NOT_NONE", "NONE_MATCH", "TRUE_MATCH", "FALSE_MATCH", "OBJECT_ALIASING", NO_ALIAS}
)
_OF_A_CLASS = _OF_AN_IDENTITY | {"TYPE_MATCH"}
_OF_A_CONSTANT = _OF_A_CLASS | {"EQUALS_MATCH"}
_OF_KEYS = _OF_A_CLASS | {"DICT_CONTAINS", "DICT_LENGTH", "LENGTH_CHECK"}
_OF_A_TUPLE = _OF_A_CLASS | {"LENGTH_CHECK"}
_OF_A_PLAIN_TENSOR = _OF_A_CLASS | {OF_A_TENSOR, "DIMENSION_DYNAMIC_MARKING_GUARD", "DYNAMIC_INDICES"}

_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_TENSORS = (Tensor, nn.Parameter)

_OF_A_FUNCTION = ("__code__", "__defaults__", "__kwdefaults__")

_ROOT = re.compile(r"L\['(\w+)'\]|G(?=\[)")
_STEP = re.compile(r"\.(?P<attribute>\w+)|\['(?P<key>[^'\\]*)'\]|\[(?P<index>\d+)\]")
_KEY = re.compile(r"list\(dict\.keys\((?P<dict>.+)\)\)\[\d+\]")


@dataclass
class Proof:
    """What has to stay as it is, by ``id``, and for which guards.

    Attributes:
        roots: the modules that the frame begins with.
        sources: the places that are proved, by Dynamo's names.
        tensors: all that are among these places.
    """

    roots: tuple[nn.Module, ...]
    sources: set[str] = field(default_factory=set)
    tensors: dict[int, Tensor] = field(default_factory=dict)
    _entries: dict[tuple[int, Any], Entry] = field(default_factory=dict)
    _sized: dict[int, dict[Any, Any]] = field(default_factory=dict)
    _objects: dict[int, object] = field(default_factory=dict)

    def check(self) -> Callable[..., bool] | None:
        """A function of the roots, true as long as it stays so in calls from plain Python; ``None`` where nobody
        tells of writes."""
        entries = [*self._entries.values(), *plain_call.plain_entries()]
        objects, tensors = list(self._objects.values()), list(self.tensors.values())
        return native.state_check(self.roots, entries, list(self._sized.values()), objects, tensors)

    def walk_to(self, root: nn.Module | dict[str, Any], steps: Sequence[Step]) -> Any:
        """What dicts lead to.

        Raises:
            LookupError: something else than dicts has a say in it.
        """
        reached: Any = root
        for step in steps:
            if step[0] == "attribute":
                self._objects[id(reached)] = reached
            if step == ("attribute", "__dict__"):
                reached = vars(reached) if hasattr(reached, "__dict__") else None
            elif isinstance(reached, FunctionType) and step[1] in _OF_A_FUNCTION:
                reached = getattr(reached, step[1])
            elif type(reached) is tuple and type(step[1]) is int:
                reached = reached[step[1]]
            else:
                for holder, key, value in walk(reached, [step]):
                    self._entries[id(holder), key] = (holder, key, value)
                    reached = value
        return reached

    def prove(self, node: Node, value: Any) -> bool:
        """Whether the guards on this place see no more of what is there than is going to be looked at."""
        kinds = node.kinds()
        if type(value) in _CONSTANTS:
            return kinds <= _OF_A_CONSTANT
        if type(value) is tuple:
            return kinds <= _OF_A_TUPLE
        if type(value) in (dict, OrderedDict):
            self._sized[id(value)] = value
            return kinds <= _OF_KEYS
        if type(value) in _TENSORS:
            marks = vars(value)
            self._sized[id(marks)] = marks
            self.tensors[id(value)] = value
            return kinds <= _OF_A_PLAIN_TENSOR and not any(map(_is_mark, marks))
        self._objects[id(value)] = value
        return kinds <= _OF_A_CLASS

    def prove_key(self, node: Node, holder: dict[Any, Any]) -> bool:
        """The same for the guards on one of the keys of a dict, all strings or the like."""
        self._sized[id(holder)] = holder
        return node.kinds() <= _OF_A_CONSTANT and all(type(key) in _CONSTANTS for key in holder)


def proof_of(nodes: Iterable[Node], roots: Mapping[str, nn.Module], f_globals: dict[str, Any]) -> Proof:
    """Prove as many guards on state as can be, now that they hold.

    Args:
        nodes: of the tree.
        roots: modules by the names that the frame has for them.
        f_globals: of the frame.
    """
    proof = Proof(tuple(roots.values()))
    state = [node for node in nodes if node.is_state]
    begins: dict[str, Any] = {f"L[{name!r}]": module for name, module in roots.items()}
    proved = [node for node in state if _is_proved(proof, node, {**begins, "G": f_globals})]
    proof.sources = {node.source for node in proved}
    # Guards between several places see all of these or none.
    between = {id(leaf) for n in state if n.source not in proof.sources for leaf in _shared(n)}
    proof.sources -= {node.source for node in proved if any(id(leaf) in between for leaf in _shared(node))}
    return proof


def _is_proved(proof: Proof, node: Node, begins: Mapping[str, Any]) -> bool:
    key = _KEY.fullmatch(node.source)
    try:
        if key is None:
            return proof.prove(node, proof.walk_to(*_path(node.source, begins)))
        holder = proof.walk_to(*_path(key["dict"], begins))
    except LookupError:
        return False
    # As long as its size stays a dict keeps its order (not so an OrderedDict).
    return type(holder) is dict and proof.prove_key(node, holder)


def _path(source: str, begins: Mapping[str, Any]) -> tuple[Any, list[Step]]:
    """Where a walk begins and its steps, by Dynamo's name for a place.

    Raises:
        LookupError: it begins elsewhere, or goes other ways than attributes, keys and indices.
    """
    begin = _ROOT.match(source)
    if begin is None or begin[0] not in begins:
        raise LookupError(source)
    position, steps = begin.end(), []
    while position < len(source):
        step = _STEP.match(source, position)
        if step is None:
            raise LookupError(source)
        position = step.end()
        if step["attribute"] is not None:
            steps.append(("attribute", step["attribute"]))
        else:
            steps.append(("item", step["key"] if step["index"] is None else int(step["index"])))
    return begins[begin[0]], steps


def _is_mark(name: str) -> bool:
    """Whether guards look at an attribute of a tensor: Dynamo's marks of dims, sets that may be added to."""
    return name.startswith("_dynamo_") and name != "_dynamo_static_input_type"


def _shared(node: Node) -> list[Any]:
    return [leaf for leaf in node.leaves if type(leaf).__name__ in SHARED]
