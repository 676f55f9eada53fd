"""What ``scaled_dot_product_attention`` makes of a boolean mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from graphcap.compiler.private.tensors import as_dynamo_traces, fake_mode_of


class _ScoreRecorder(TorchDispatchMode):
    """Notes the numbers that become tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numbers: set[float] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.scalar_tensor.default:
            self.numbers.add(args[0])
        return func(*args, **(kwargs or {}))


def forbidden_score(args: Sequence[Any], kwargs: Mapping[str, Any]) -> float | None:
    """What is added to a score that the boolean mask of this call forbids; ``None`` where torch does not tell.

    It is -inf, but -65504 where torch before 2.12 chooses cuDNN (a detour around an error of cuDNN, ended by
    pytorch#177868): a row that may see nothing then sees everything, elsewhere it gets 0. So the call is run on fake
    tensors, and watched.

    Args:
        args, kwargs: of the call, with fake tensors. What torch chooses for other sizes makes a difference only to rows
            that may see nothing.
    """
    recorder = _ScoreRecorder()
    try:
        with torch.no_grad(), as_dynamo_traces(fake_mode_of(args)), recorder:
            torch.nn.functional.scaled_dot_product_attention(*args, **kwargs)
    except Exception:  # sizes that nothing is known of
        return None
    scores = recorder.numbers - {0.0}
    return scores.pop() if len(scores) == 1 else None
