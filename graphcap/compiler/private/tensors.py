"""What torch knows about a tensor, real or fake, and modes that make fake ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch


def is_static_input(example: object) -> bool:
    """Whether Dynamo knows this tensor as a parameter, a buffer or an address that the user marked static."""
    return getattr(example, "_dynamo_static_input_type", None) is not None


def marked_dims(example: object) -> list[int]:
    """The dims of a tensor that ``mark_dynamic`` or ``mark_unbacked`` marked, in order; not those of ``maybe_``."""
    marks = [getattr(example, name, ()) for name in ("_dynamo_dynamic_indices", "_dynamo_unbacked_indices")]
    return sorted(set().union(*marks))


def storage_id(tensor: torch.Tensor) -> int:
    """Identity of the storage, also of a fake tensor's; equal for tensors that alias."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except NotImplementedError:  # inside vmap a tensor shows no storage; negative, since it is no storage's address
        return -id(tensor)


def weak_storage(tensor: torch.Tensor) -> Callable[[], bool]:
    """A function that says whether the storage is gone; while it lives, no other storage has this one's identity."""
    from torch.multiprocessing.reductions import StorageWeakRef

    expired: Callable[[], bool] = StorageWeakRef(tensor.untyped_storage()).expired
    return expired


def is_wrapper_subclass(tensor: torch.Tensor) -> bool:
    """Whether a tensor is made of inner tensors (``__tensor_flatten__``)."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    return bool(is_traceable_wrapper_subclass(tensor))


def is_plain_tensor(tensor: torch.Tensor) -> bool:
    """Whether a fake tensor stands for a plain tensor, not for a subclass with an own dispatch."""
    from torch._subclasses.fake_tensor import FakeTensor

    return type(tensor) in (FakeTensor, torch.Tensor, torch.nn.Parameter)


def is_real(value: object) -> bool:
    """Whether a value is a tensor with memory of its own."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor)


def fake_mode_of(values: Sequence[object]) -> Any:
    """The mode of the first fake tensor among ``values``, ``None`` without one.

    Not the tracing context's: Dynamo gives a backend a context with a fresh mode, while the values in its graph still
    belong to the mode of the trace. Both share one shape environment.
    """
    from torch._subclasses.fake_tensor import FakeTensor

    return next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)


@contextlib.contextmanager
def as_dynamo_traces(fake_mode: Any) -> Iterator[None]:
    """Run operators on fake tensors as a trace does (Python decompositions first), without adding guards to it."""
    from torch._dispatch.python import enable_python_dispatcher

    shape_env = getattr(fake_mode, "shape_env", None)
    unguarded = shape_env.suppress_guards() if shape_env is not None else contextlib.nullcontext()
    with fake_mode or contextlib.nullcontext(), unguarded, enable_python_dispatcher():
        yield


def default_device() -> torch.device | None:
    """What ``torch.set_default_device`` or ``with torch.device(...)`` chose, ``None`` for neither: both are modes."""
    return torch.get_default_device() if torch._C._len_torch_function_stack() else None


@contextlib.contextmanager
def real_tensors_allowed(fake_mode: Any) -> Iterator[None]:
    """Within it, operations of a ``FakeTensorMode`` take real tensors too, for their shapes."""
    before = fake_mode.allow_non_fake_inputs
    fake_mode.allow_non_fake_inputs = True
    try:
        yield
    finally:
        fake_mode.allow_non_fake_inputs = before
