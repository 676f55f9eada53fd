"""Which arguments say where something is written: a padded row of theirs must not point at a real one.

The same question as :mod:`graphcap.compiler.write_indices`, asked of a recording.
"""

from __future__ import annotations

import torch

from graphcap.compiler.breakable.agree import Recorded
from graphcap.compiler.breakable.calls import Call, Kind, Ref
from graphcap.compiler.rules import op_name
from graphcap.compiler.write_indices import SCATTERS

#: A slice that is assigned to is one operator here.
_SCATTERS = (*SCATTERS, "slice_scatter")


def write_indices(recording: Recorded) -> frozenset[int]:
    """The numbers of the integer arguments whose values reach, through integer results, a call that writes by index.

    A custom operator or an ``@graphcap.eager`` function that writes may take any integer tensor for an index.
    """
    made_by = {number: call for call in recording.calls for number in call.results if number is not None}
    queue = [number for call in recording.calls for number in _indices_of(call)]
    seen: set[int] = set()
    while queue:
        number = queue.pop()
        if number not in seen and is_integer(recording, number):
            seen.add(number)
            queue += made_by[number].reads() if number in made_by else ()
    return frozenset(number for number in seen if recording.values[number].kind is Kind.ARGUMENT)


def _indices_of(call: Call) -> list[int]:
    name = op_name(call.function)
    if name.startswith("aten::"):
        plain = name.removeprefix("aten::").strip("_")
        given = [leaf.value for leaf in call.leaves if isinstance(leaf, Ref)]
        return given[1:] if any(plain.startswith(each) for each in _SCATTERS) else []
    return call.reads() if call.written else []


def is_integer(recording: Recorded, number: int) -> bool:
    """Whether a value is a tensor of integers or bools."""
    dtype: torch.dtype = recording.values[number].layout[2]
    return not dtype.is_floating_point and not dtype.is_complex
