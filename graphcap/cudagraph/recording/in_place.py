"""Inputs that captured steps use in place, as they see them: without an owner, so that no plan keeps a parameter alive.

A model has hundreds of them, and they lie where they lay when the last plan was captured.
"""

from __future__ import annotations

from typing import Any

import torch

from graphcap.cudagraph.private import weak_view


class InPlace:
    """The views of the inputs of one program, made again only where an input has moved."""

    def __init__(self) -> None:
        self._views: dict[int, tuple[tuple[Any, ...], torch.Tensor]] = {}

    def view(self, index: int, tensor: torch.Tensor) -> torch.Tensor:
        """A non-owning view of input ``index``, which is this tensor now."""
        storage = tensor.untyped_storage()
        where = storage.data_ptr(), storage.nbytes(), tensor.storage_offset()
        form = where, tensor.size(), tensor.stride(), tensor.dtype
        known = self._views.get(index)
        if known is None or known[0] != form:
            known = self._views[index] = form, weak_view(tensor)
        return known[1]
