"""What cannot be repeated from a recording, and what a graph cannot hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphcap.compiler.rules import HOST_SYNC_OPS, op_name, target_never_captured

#: Ways out of torch without an operator. What lies behind them is invisible, so it belongs in ``@graphcap.eager``.
WAYS_OUT = {
    "tolist": "hands values to Python",
    "numpy": "hands its memory to numpy",
    "__array__": "hands its memory to numpy",
    "__dlpack__": "hands its memory to another library",
    "data_ptr": "hands its address to a kernel that torch does not know",
}
_MASKS = (torch.bool, torch.uint8)


def reads_values(func: Any, args: Any, kwargs: Any) -> str:
    """Why an operator makes Python depend on values: it returns them, or a tensor of so many rows."""
    name = op_name(func)
    if func.namespace == "aten" and name.rpartition("::")[2] in HOST_SYNC_OPS:
        return f"{name} waits for a value; put it into an @graphcap.eager function"
    if torch.Tag.data_dependent_output in func.tags:
        return f"{name} waits for a value; put it into an @graphcap.eager function"
    if torch.Tag.dynamic_output_shape in func.tags and kwargs.get("output_size") is None:
        if name == "aten::index" and not _has_mask(args):
            return ""
        return f"the values that {name} reads decide the size of its result; put it into an @graphcap.eager function"
    return ""


def why_live(func: Any, args: Any, leaves: Sequence[Any]) -> str:
    """Why a graph cannot hold this call, ``""`` where it can."""
    name = op_name(func)
    if any(isinstance(leaf, torch.Generator) for leaf in leaves):
        return f"{name} draws from a generator of its own"
    if name in ("aten::index_put", "aten::index_put_", "aten::_index_put_impl_") and _has_mask(args):
        return f"{name} with a mask waits for the number of rows"
    return target_never_captured(func) or ""


def _has_mask(args: Any) -> bool:
    return any(isinstance(each, torch.Tensor) and each.dtype in _MASKS for each in args[1])
