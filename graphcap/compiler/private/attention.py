"""What ``scaled_dot_product_attention`` makes of a boolean mask.

Scores that a mask forbids become -inf. Where torch before 2.12 chooses cuDNN they become -65504 (a detour around an
error of cuDNN; pytorch#177868 ended it): a row that may see nothing then sees everything, elsewhere it gets 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from graphcap.compiler.private.tensors import as_dynamo_traces, fake_mode_of

_CUDNN_GETS_NUMBERS = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12)


def forbidden_score(args: Sequence[Any], kwargs: Mapping[str, Any]) -> float | None:
    """What a score that the boolean mask of this call forbids is set to; ``None`` where torch does not tell.

    Args:
        args, kwargs: of the call, with fake tensors. On a GPU torch before 2.12 chooses by their sizes; what it chooses
            for others makes a difference only to rows that may see nothing.
    """
    if not _CUDNN_GETS_NUMBERS or not args[0].is_cuda:
        return -torch.inf
    try:
        with as_dynamo_traces(fake_mode_of(args)):
            chosen = torch._fused_sdp_choice(*args, **kwargs)
    except Exception:  # sizes that nothing is known of
        return None
    return -65504.0 if chosen == SDPBackend.CUDNN_ATTENTION.value else -torch.inf
