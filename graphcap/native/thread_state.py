"""In Python: which of torch's modes a thread is in."""

from __future__ import annotations

from collections.abc import Hashable

import torch


class ThreadState:
    """Whether a thread is in the modes of torch in which another one, or the same, was when this was made.

    Called without arguments. Compared are: the dispatch keys that are in force or not (which is where functorch's
    transforms, ``torch.jit.trace``, dispatch modes and autocast show), grad mode, forward-mode differentiation,
    inference mode, how many dispatch modes and function modes there are, and whether ``__torch_function__`` is
    disabled. Not which modes these are.
    """

    __slots__ = ("_modes",)

    def __init__(self) -> None:
        self._modes = _modes()

    def __call__(self) -> bool:
        return self._modes == _modes()


def _modes() -> tuple[Hashable, ...]:
    return (
        torch._C._dispatch_tls_local_include_set().raw_repr(),
        torch._C._dispatch_tls_local_exclude_set().raw_repr(),
        torch._C._len_torch_dispatch_stack(),
        torch._C._len_torch_function_stack(),
        torch._C._is_torch_function_enabled(),
        torch._C._is_torch_function_all_disabled(),
        torch.is_grad_enabled(),
        torch._C._is_fwd_grad_enabled(),
        torch.is_inference_mode_enabled(),
    )
