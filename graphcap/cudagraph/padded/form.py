"""Whether the outputs of a padded call can be told from those of an exact one by anything but their values."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from graphcap.cudagraph.private import storage_address
from graphcap.cudagraph.program import Program


def why_not_apart(program: Program, inputs: Collection[int], padded: Sequence[Any], outputs: Sequence[Any]) -> str:
    """Which output lies in a padded input, whose memory is not the caller's; ``""`` where none does.

    Args:
        program: whose call it is.
        inputs: those that are padded.
        padded: the arguments of the padded call.
        outputs: of it.
    """
    memory = {storage_address(padded[index]): index for index in inputs} | {0: -1}
    for number, (slot, value) in enumerate(zip(program.outputs, outputs, strict=True)):
        if isinstance(slot, int) and slot in inputs:
            continue
        index = memory.get(storage_address(value), -1) if isinstance(value, torch.Tensor) else -1
        if index >= 0:
            return f"output {number} shares memory with {program.inputs[index].name}, which is padded"
    return ""


def why_not_alike(
    mine: Sequence[Any], args: Sequence[Any], expected: Sequence[Any], expected_args: Sequence[Any]
) -> str:
    """In what way outputs differ from the expected ones besides their values; ``""`` where they do not.

    Args:
        mine: outputs, cut to the exact size.
        args: of their call.
        expected: outputs of the call at its exact size.
        expected_args: of that.
    """
    for number, (value, truth) in enumerate(zip(mine, expected, strict=True)):
        one, other = _form(value, args), _form(truth, expected_args)
        if one != other:
            return f"output {number} has another form than without padding: {one}, expected {other}"
    if _sharing(mine) != _sharing(expected):
        return "outputs share memory with each other in another way than without padding"
    return ""


def _form(value: Any, args: Sequence[Any]) -> tuple[Any, ...]:
    """Dtype, size, strides, and the argument that it is or lies in, with how far from its start."""
    if not isinstance(value, torch.Tensor):
        return (type(value),)
    strides = tuple(stride for size, stride in zip(value.shape, value.stride(), strict=True) if size > 1)
    address = storage_address(value)
    tensors = [(index, arg) for index, arg in enumerate(args) if isinstance(arg, torch.Tensor)]
    inside = [
        (i, value.data_ptr() - arg.data_ptr()) for i, arg in tensors if address and storage_address(arg) == address
    ]
    return (
        value.dtype,
        tuple(value.shape),
        strides if value.numel() else (),
        inside[:1],
        [i for i, a in tensors if a is value],
    )


def _sharing(outputs: Sequence[Any]) -> list[int]:
    """For each output the first one in the same storage."""
    addresses = [storage_address(each) if isinstance(each, torch.Tensor) else 0 for each in outputs]
    return [addresses.index(address) if address else number for number, address in enumerate(addresses)]
