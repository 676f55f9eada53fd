"""What a user makes for a batch that is captured: the arguments of a call, and the inputs of its step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from graphcap.cudagraph import GraphKey
from graphcap.errors import StepError

#: Takes a batch, returns the positional and keyword arguments of a call with such a batch, and the inputs of its step
#: where ops of the model read any.
MakeInputs = Callable[
    [GraphKey],
    tuple[Sequence[Any], Mapping[str, Any]] | tuple[Sequence[Any], Mapping[str, Any], Mapping[str, Any]],
]


def made_for(
    key: GraphKey, make_inputs: MakeInputs
) -> tuple[Sequence[Any], Mapping[str, Any], Mapping[str, Any] | None]:
    """The arguments and keyword arguments of a call with a batch, and the inputs of its step, ``None`` for none.

    Raises:
        StepError: ``make_inputs`` returned something else. A bare tensor would be taken apart into its rows.
        Exception: what it raises.
    """
    made: Any = make_inputs(key)
    if not isinstance(made, (tuple, list)):
        raise _refusal(key, _kind(made))
    if len(made) not in (2, 3):
        raise _refusal(key, f"{_kind(made)} of {len(made)}")
    args, kwargs, inputs = (*made, None)[:3]
    if not isinstance(args, Sequence):
        raise _refusal(key, f"{_kind(args)} as args")
    if not isinstance(kwargs, Mapping):
        raise _refusal(key, f"{_kind(kwargs)} as kwargs")
    if inputs is not None and not isinstance(inputs, Mapping):
        raise _refusal(key, f"{_kind(inputs)} as inputs of the step")
    return args, kwargs, inputs


def _refusal(key: GraphKey, what: str) -> StepError:
    return StepError(
        f"make_inputs returned {what} for {key}; expected (args, kwargs) or (args, kwargs, inputs of the step): "
        "for a model that takes one tensor, return (x,), {}"
    )


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
