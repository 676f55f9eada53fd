"""Running an ``@graphcap.eager`` function for its output shapes without a trace of it in the memory that it holds.

The arguments are fake then, and what the function holds itself (weights, a cache, a table of positions) is real. An
operation on both is fake. One on real tensors alone runs, as its values may be needed: a length is read off a table.
But it must not write: a trace calls the function several times, before and beside the call that the user makes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from graphcap.compiler import nodes, private
from graphcap.compiler.effects import declared_written


class RealTensorsUnwritten(TorchDispatchMode):
    """Writes to a real tensor go to a fake one, which is read in its place from then on.

    Reading a value off it, which there is none of, raises what torch raises for fake tensors: the trace breaks there,
    and the function runs outside of it.

    Attributes:
        moves_on: whether something was written by an operation on real tensors alone: a counter, a position. A cache
            gets the same rows again when a call is repeated, such a thing does not stay what it was.
    """

    supports_higher_order_operators = True

    def __init__(self, fake_mode: Any) -> None:
        """``fake_mode``: the ``FakeTensorMode`` of the arguments."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._fake_mode = fake_mode
        self._written: dict[int, torch.Tensor] = {}  # by storage; the tensor keeps it from being somebody else's
        self.moves_on = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves, spec = private.tree_flatten((args, kwargs))
        for leaf in nodes.leaves(list(declared_written(func, args, kwargs))):
            if private.is_real(leaf):
                self._written[private.storage_id(leaf)] = leaf
                self.moves_on |= all(map(private.is_real, filter(torch.is_tensor, leaves)))
        if any(private.is_real(leaf) and private.storage_id(leaf) in self._written for leaf in leaves):
            fakes = [self._fake(leaf) if private.is_real(leaf) else leaf for leaf in leaves]
            args, kwargs = private.tree_unflatten(fakes, spec)
        return func(*args, **kwargs)

    def _fake(self, tensor: torch.Tensor) -> Any:
        """The same for every tensor, and in the same memory for tensors that share theirs."""
        return self._fake_mode.from_tensor(tensor, static_shapes=True)
