"""The result of a call as Python sees it: a tree of tensors, plain values and arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphcap.compiler import private
from graphcap.compiler.breakable.key import PLAIN, Arguments, plain_key

#: Where a leaf comes from: ``("tensor", output)``, ``("argument", leaf)`` or ``("plain", value)``.
Leaf = tuple[str, Any]


@dataclass(frozen=True)
class Result:
    """How to make the result of a call from the outputs of its program.

    Attributes:
        leaves: in the order of the tree.
        spec: the structure.
        odd: why it cannot be made again, ``""`` where it can.
    """

    leaves: list[Leaf]
    spec: Any
    odd: str = ""

    @classmethod
    def of(cls, result: Any, arguments: Arguments) -> Result:
        """Take a result apart."""
        given = {id(leaf): index for index, leaf in enumerate(arguments.leaves)}
        found, spec = private.tree_flatten(result)
        leaves: list[Leaf] = []
        num_tensors = 0
        for leaf in found:
            if isinstance(leaf, torch.Tensor):
                leaves.append(("tensor", num_tensors))
                num_tensors += 1
            elif isinstance(leaf, PLAIN):
                leaves.append(("plain", leaf))
            elif id(leaf) in given:
                leaves.append(("argument", given[id(leaf)]))
            else:
                kind = type(leaf).__name__
                return cls([], spec, f"the result holds a {kind}: return tensors, plain values, containers, arguments")
        return cls(leaves, spec)

    def make(self, arguments: Arguments, outputs: Sequence[Any]) -> Any:
        """The result of another call."""
        leaves = [
            outputs[what] if kind == "tensor" else arguments.leaves[what] if kind == "argument" else what
            for kind, what in self.leaves
        ]
        return private.tree_unflatten(leaves, self.spec)

    def difference(self, other: Result) -> str:
        """Why two results cannot be made in one way, ``""`` where they can."""
        same = other.spec == self.spec and list(map(_key, self.leaves)) == list(map(_key, other.leaves))
        return "" if same else "the result has another structure, or holds other numbers, in the next call"


def _key(leaf: Leaf) -> tuple[str, Any]:
    kind, what = leaf
    return (kind, plain_key(what)) if kind == "plain" else leaf
