"""How passes read the nodes of a post-grad ATen graph."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import fx

from graphcap.passes.private import surely_equal


def value_of(node: fx.Node) -> Any:
    """The fake tensor (or SymInt, or tuple of them) that the node was traced with."""
    return node.meta["val"]


def is_call(node: object, *targets: object) -> TypeGuard[fx.Node]:
    """Whether ``node`` is a node that calls one of ``targets``."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def has_one_user(node: fx.Node) -> bool:
    """Whether exactly one node reads the result."""
    return len(node.users) == 1


def only_user(node: fx.Node, target: object) -> fx.Node | None:
    """The single user of ``node`` when it calls ``target``, else ``None``."""
    users = tuple(node.users)
    return users[0] if len(users) == 1 and is_call(users[0], target) else None


def is_contiguous(tensor: torch.Tensor) -> bool:
    """Row-major without gaps for every value of the symbols; ``False`` where that is not known. Adds no guard."""
    expected: int | torch.SymInt = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if not surely_equal(size, 1) and not surely_equal(stride, expected):
            return False
        expected = expected * size
    return True
