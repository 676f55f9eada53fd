"""Memory that a call has made and that no operator has written.

Where it is read all the same, a kernel that torch does not know has written it (one of Triton, say, which asks for an
address in a way that nobody sees). A recording has no such kernel: a run of it would read whatever is there, which may
by chance be what the kernel has left in an earlier call, so that no comparison finds it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from graphcap.compiler import private
from graphcap.compiler.rules import op_name

_MAKERS = {
    "aten::empty", "aten::empty_like", "aten::empty_permuted", "aten::empty_strided", "aten::new_empty",
    "aten::new_empty_strided",
}  # fmt: skip
#: Operators that write into a tensor without a look at what is in it, at least where they write.
_WRITERS = {
    "aten::bernoulli_", "aten::cauchy_", "aten::copy_", "aten::exponential_", "aten::fill_", "aten::geometric_",
    "aten::index_copy_", "aten::index_fill_", "aten::index_put_", "aten::log_normal_", "aten::masked_fill_",
    "aten::masked_scatter_", "aten::normal_", "aten::random_", "aten::scatter_", "aten::set_", "aten::uniform_",
    "aten::zero_",
}  # fmt: skip
#: Operators whose first argument counts for nothing where ``beta`` is 0: it may be empty, NaN included.
_SCALED_BY_BETA = {"aten::addbmm", "aten::addmm", "aten::addmv", "aten::addr", "aten::baddbmm"}
_WHY = "memory that no operator has written: a kernel that torch does not know belongs into an @graphcap.eager function"


class Unwritten:
    """Follows the memory of one call."""

    def __init__(self) -> None:
        self._storages: set[int] = set()

    def meet(
        self, function: Any, leaves: Sequence[Any], kwargs: Any, written: Iterable[int], made: Iterable[torch.Tensor]
    ) -> str:
        """An operator has run.

        Args:
            function: the operator.
            leaves: what it was called with, flat.
            kwargs: the keyword arguments among them.
            written: the storages that it says it wrote.
            made: what it returned that was not there before, views of the others included.

        Returns:
            Why a recording of it cannot be repeated, ``""`` where it can.
        """
        name, wrote = op_name(function), set(written)
        read_by = leaves[1:] if name in _SCALED_BY_BETA and kwargs.get("beta") == 0 else leaves
        seen = _storages(read_by)
        new = _storages(made) - _storages(leaves)
        if not wrote and not new:
            return ""  # a view
        reads_what_it_writes = name.startswith("aten::") and name.endswith("_") and name not in _WRITERS
        read = set() if name in _MAKERS else seen if reads_what_it_writes else seen - wrote
        found = self._storages & read
        self._storages -= wrote | new  # a new one may have the number of another that is gone
        if name in _MAKERS:
            self._storages |= new
        return f"{name} reads {_WHY}" if found else ""

    def written(self, tensors: Iterable[torch.Tensor]) -> None:
        """Somebody may have written these."""
        self._storages -= _storages(tensors)

    def returned(self, result: Iterable[Any]) -> str:
        """As :meth:`meet`, for what the call returns."""
        return f"the call returns {_WHY}" if self._storages & _storages(result) else ""


def _storages(values: Iterable[Any]) -> set[int]:
    return {private.storage_id(each) for each in values if isinstance(each, torch.Tensor) and each.numel()}
