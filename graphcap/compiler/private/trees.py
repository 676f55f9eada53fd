"""Nested containers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def tree_flatten(tree: Any) -> tuple[list[Any], Any]:
    """The leaves of nested containers and their structure (``torch.utils._pytree``); structures compare and hash."""
    from torch.utils import _pytree as pytree

    return pytree.tree_flatten(tree)


def tree_unflatten(leaves: Sequence[Any], spec: Any) -> Any:
    """The inverse of :func:`tree_flatten`."""
    from torch.utils import _pytree as pytree

    return pytree.tree_unflatten(leaves, spec)


def tree_leaf_names(tree: Any) -> list[str]:
    """Where each leaf of a tree lies: ``"[0].ids"``."""
    from torch.utils import _pytree as pytree

    return [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(tree)[0]]
