"""Any program of additions, in-place writes and views, captured in any way, is what the live program is: in values,
strides, identity, shared memory and effects, over several calls."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from graphcap.cudagraph import Capture
from tests.cudagraph.regions import Region, runner_of

NUM_CALLS = 7

FRESH = {
    "add": lambda a, b: a[: b.numel()] + b[: a.numel()],
    "twice": lambda a, b: a * 2,
    "widen": lambda a, b: (a + 1)[None].expand(2, -1).reshape(-1)[: a.numel()],
}
VIEWS = {
    "tail": lambda a, b: a[1:] if a.numel() > 1 else a,
    "head": lambda a, b: a[: max(1, a.numel() - 1)],
    "self": lambda a, b: a,
    "bits": lambda a, b: a.view(torch.float32),
}
WRITES = {
    "add_": lambda a, b: a.add_(1),
    "mul_": lambda a, b: a.mul_(0.5) + 1,
}
OPS = FRESH | VIEWS | WRITES


def two_results(a, b):
    base = a + 1
    return base, base[1:] if base.numel() > 1 else base


@st.composite
def programs(draw):
    region = Region()
    slots = [region.static("w"), region.tensor("x"), region.tensor("y")]
    for _ in range(draw(st.integers(1, 7))):
        a, b = draw(st.sampled_from(slots)), draw(st.sampled_from(slots))
        capture = draw(st.sampled_from(Capture))
        name = draw(st.sampled_from([*OPS, "two"]))
        if name == "two":
            slots += region.step(two_results, a, b, writes=2, capture=capture)
        else:
            slots.append(region.step(OPS[name], a, b, mutates=[a] if name in WRITES else [], capture=capture))
    return region.returning(*draw(st.lists(st.sampled_from(slots), min_size=1, max_size=4)))


def arguments(call: int, moves: str, weight: torch.Tensor) -> list[torch.Tensor]:
    """Three tensors ``[5]``: x and y are new ones, slices of one buffer, one tensor twice, or the weight itself."""
    generator = torch.Generator().manual_seed(call)
    draw = torch.randn(12, generator=generator)
    if moves == "apart":
        return [weight, draw[:5].clone(), draw[5:10].clone()]
    if moves == "slices":
        return [weight, draw[:5], draw[3:8]]
    if moves == "twice":
        return [weight, x := draw[:5].clone(), x]
    return [weight, weight, draw[:5].clone()]


def copies(args):
    """The same arguments in other memory, sharing it in the same way."""
    storages: dict[int, torch.UntypedStorage] = {}
    tensors: dict[int, torch.Tensor] = {}
    for arg in args:
        storage = arg.untyped_storage()
        clone = storages.setdefault(storage.data_ptr(), storage.clone())
        tensors.setdefault(id(arg), torch.empty(0).set_(clone, arg.storage_offset(), arg.size(), arg.stride()))
    return [tensors[id(arg)] for arg in args]


def relations(args, outputs):
    """Which values are one object, and how far apart those lie that share a storage."""
    values = [*args, *outputs]
    pairs = [(a, b) for at, a in enumerate(values) for b in values[at + 1 :]]
    shared = [a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() for a, b in pairs]
    apart = [a.data_ptr() - b.data_ptr() if same else None for same, (a, b) in zip(shared, pairs, strict=True)]
    return [a is b for a, b in pairs], apart


@given(
    program=programs(),
    mode=st.sampled_from(["PIECEWISE", "FULL", "AUTO"]),
    moves=st.lists(st.sampled_from(["apart", "slices", "twice", "weight"]), min_size=1, max_size=2),
    limit=st.sampled_from([8, 2**20]),
    outputs=st.sampled_from(["clone", "static", "ring:1", "ring:2"]),
    verify=st.sampled_from([False, True, 1]),
)
def test_any_program_is_what_it_is_live(program, mode, moves, limit, outputs, verify):
    runner = runner_of(program, cudagraph_mode=mode, max_copy_bytes=limit, outputs=outputs, verify=verify)
    weight = torch.ones(5)
    kept = []
    for call in range(NUM_CALLS):
        args = arguments(call, moves[call * len(moves) // NUM_CALLS], weight)
        theirs = copies(args)
        expected, got = program.run(*theirs), runner(*args)
        for mine, other in zip((*got, *args), (*expected, *theirs), strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=0)
            assert mine.stride() == other.stride()
        assert relations(args, got) == relations(theirs, expected)
        kept.append((args, theirs, got, expected))
    for _, _, got, expected in kept[-1:]:
        assert all(map(torch.equal, got, expected))
    assert not runner.stats.failures
    assert not runner.stats.divergences
    assert not runner.stats.unchecked


@given(
    program=programs(),
    mode=st.sampled_from(["PIECEWISE", "FULL"]),
    limit=st.sampled_from([8, 2**20]),
    outputs=st.sampled_from(["static", "ring:1", "ring:2"]),
)
def test_outputs_may_be_the_next_arguments(program, mode, limit, outputs):
    """What a call makes is right although its argument lies in the memory that it makes it in."""
    runner = runner_of(program, cudagraph_mode=mode, max_copy_bytes=limit, outputs=outputs)
    weight, got = torch.ones(5), ()
    for call in range(NUM_CALLS):
        args = arguments(call, "apart", weight)
        args[1] = next((each for each in got if each.shape == (5,) and each.is_contiguous()), args[1])
        theirs = copies(args)
        expected, got = program.run(*theirs), runner(*args)
        given = {arg.untyped_storage().data_ptr() for arg in theirs}
        for mine, other in zip(got, expected, strict=True):
            if other.untyped_storage().data_ptr() not in given:
                torch.testing.assert_close(mine, other, rtol=0, atol=0)
    assert not runner.stats.failures
