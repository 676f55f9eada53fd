"""Everything this room takes from torch that torch does not promise to keep. Checked on 2.11 and 2.13."""

from __future__ import annotations

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass as CustomGraphPass
from torch.fx.experimental.symbolic_shapes import statically_known_true


def current_raw_stream(index: int) -> int:
    """The handle of the current stream of a CUDA device."""
    return int(torch._C._cuda_getCurrentRawStream(index))


def surely_equal(left: int | torch.SymInt, right: int | torch.SymInt) -> bool:
    """Whether two sizes are equal for every value of their symbols; asking adds no guard."""
    return left is right or bool(statically_known_true(left == right))
