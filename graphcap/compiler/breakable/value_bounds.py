"""Which integer arguments may hold other values than a call brings: see :mod:`graphcap.compiler.value_bounds`, which
asks the same of a graph.

A table is a tensor from outside of the call here: whether the size of another one follows that of the call is not
known.
"""

from __future__ import annotations

from graphcap.compiler.breakable.agree import Recorded
from graphcap.compiler.breakable.calls import Call, Kind, Ref
from graphcap.compiler.breakable.write_indices import is_integer
from graphcap.compiler.rules import op_name
from graphcap.compiler.value_bounds import ARITHMETIC, BY_INDEX, EQUALITY, METADATA, SAME, plain_name
from graphcap.cudagraph import ANY


def value_bounds(recording: Recorded) -> dict[int, int]:
    """The numbers of the integer and bool arguments with values that may be made up, each with the bound below which
    they are good."""
    numbers = (
        number
        for number, value in enumerate(recording.values)
        if value.kind is Kind.ARGUMENT and is_integer(recording, number)
    )
    return {number: bound for number in numbers if (bound := _bound(recording, number)) is not None}


def _bound(recording: Recorded, given: int) -> int | None:
    is_calculated, bound, same, others, flags = False, ANY, {given}, set[int](), set[int]()
    for call in recording.calls:  # in the order in which they ran: a value is made before it is read
        read = [number for number in call.reads() if number in same or number in others]
        if not read:
            continue
        at = _rows_indexed(recording, call, read)
        name = plain_name(op_name(call.function))
        if at is not None:
            if at == 0 or others.intersection(read):
                return None
            bound = min(bound, at)
        elif name not in METADATA:
            if (name not in SAME and name not in ARITHMETIC) or call.written:
                return None
            is_calculated |= name in ARITHMETIC and name not in EQUALITY and not flags.issuperset(read)
            made = [number for number in call.results if number is not None and is_integer(recording, number)]
            (same if name in SAME and not others.intersection(read) else others).update(made)
            flags.update(made if name in EQUALITY or flags.issuperset(read) else ())
    return ANY if is_calculated else bound


def _rows_indexed(recording: Recorded, call: Call, index: list[int]) -> int | None:
    """How many rows the table has that a call indexes, 0 where that is not known; ``None`` where it indexes none."""
    name = plain_name(op_name(call.function))
    if name not in (*BY_INDEX, "embedding", "index") or not call.leaves:
        return None
    table, rest = call.leaves[0], call.leaves[1:]
    if not isinstance(table, Ref) or recording.values[table.value].kind is not Kind.OUTSIDE:
        return 0
    if any(recording.values[number].layout[2].itemsize == 1 for number in index):  # flags, of one sort or the other
        return 0
    dim = rest[0] if name in BY_INDEX else 0
    if name == "index":  # the indices of the dims in order, and nothing where a dim is taken whole
        places = [place for place, leaf in enumerate(rest) if isinstance(leaf, Ref)]
        dim = places[0] if len(places) == 1 else None
    size = recording.values[table.value].layout[0]
    return int(size[dim]) if type(dim) is int and -len(size) <= dim < len(size) else 0
