"""A look at a call padded to other sizes, of which nothing is left: what it writes is put back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from graphcap.compiler.breakable.incoming import Incoming
from graphcap.compiler.breakable.look import Look, Viewpoint
from graphcap.compiler.breakable.undo import Memory
from graphcap.config import Config
from graphcap.cudagraph import Program
from graphcap.cudagraph.dispatch.metadata import PREFIX, dims_of_step
from graphcap.cudagraph.dispatch.step import current
from graphcap.cudagraph.padded.corner import corner, declared_fill, fill_around
from graphcap.cudagraph.padded.padding import Padding


class NoRoom(Exception):
    """What a call writes cannot be copied."""


def look_unseen(
    call: Incoming,
    viewpoint: Viewpoint,
    written: Sequence[torch.Tensor],
    replaced: Mapping[int, torch.Tensor],
    max_bytes: int,
) -> Look:
    """Look at a call with other tensors, and put back what it writes.

    Args:
        call: of which nothing has run.
        viewpoint: of the entry.
        written: every tensor that such a call writes, apart from those that are replaced.
        replaced: by ``id`` of the call's own tensors.
        max_bytes: that a copy of what is written may take.

    Raises:
        NoRoom: a copy would take more.
        Exception: what the function raises.
    """
    memory = Memory(written)
    if memory.nbytes > max_bytes:
        raise NoRoom(f"a copy of what it writes takes {memory.nbytes} bytes, {max_bytes} are allowed")
    try:
        before = memory.copy()
    except torch.OutOfMemoryError as error:
        raise NoRoom(f"what it writes cannot be copied: {error}") from None
    tensors = [replaced.get(id(tensor), tensor) for tensor in call.arguments.tensors]
    try:
        with call.with_tensors(replaced) as function:
            return viewpoint.look(function, tensors, call.arguments, call.names)
    finally:
        memory.restore(before)


def written_by(program: Program, inputs: Sequence[Any]) -> list[torch.Tensor]:
    """The inputs that a program writes."""
    slots = {slot for step in program.steps for slot in step.mutates if slot < len(inputs)}
    return [inputs[slot] for slot in sorted(slots)]


def padded_tensors(
    call: Incoming, padding: Padding, inputs: Sequence[Any], rung: Mapping[str, int], config: Config
) -> dict[int, torch.Tensor]:
    """The tensors of a call at the sizes of a rung, and the inputs of its step that are no arguments of the program.

    Raises:
        Exception: what a fill of the user's raises.
    """
    padded = padding.pad(inputs, rung)
    found = {
        id(mine): other
        for mine, other in zip(inputs, padded, strict=True)
        if isinstance(mine, torch.Tensor) and mine is not other
    }
    said = current()
    goal = padding.goal(inputs, rung)
    for path, names in dims_of_step(config.dynamic_arg_dims).items() if said is not None else ():
        assert said is not None
        given = said.inputs.given.get(path.removeprefix(PREFIX))
        if isinstance(given, torch.Tensor) and id(given) not in found:
            found[id(given)] = _at(given, names, goal, declared_fill(config.pad, path))
    return found


def _at(tensor: torch.Tensor, names: Mapping[int, str], goal: Mapping[str, int], fill: Any) -> torch.Tensor:
    size = [goal.get(names.get(dim, ""), length) for dim, length in enumerate(tensor.shape)]
    with torch.inference_mode(False), torch.no_grad():
        larger = torch.empty(size, dtype=tensor.dtype, device=tensor.device)
        corner(larger, tensor.shape).copy_(tensor)
        fill_around(larger, tensor.shape, 0 if fill is None else fill)
    return larger
