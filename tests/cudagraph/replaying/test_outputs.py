"""What a replay hands back: values, strides, identity and shared memory as in a live call."""

from __future__ import annotations

import torch

from graphcap.cudagraph import Capture
from tests.cudagraph.regions import LIVE, Region, randn, runner_of

KINDS = (Capture.ALWAYS, LIVE)


def test_outputs_of_earlier_calls_stay_as_they_were():
    """Field notes row 25: an output is overwritten by a later run."""
    region = Region()
    x = region.tensor("x")
    runner = runner_of(region.returning(region.step(lambda x: x * 2, x)))
    inputs = [randn(3) for _ in range(7)]
    kept = [runner(x)[0] for x in inputs]
    assert all(torch.equal(y, x * 2) for x, y in zip(inputs, kept, strict=True))


def test_strides_are_kept():
    region = Region()
    x = region.tensor("x")
    fns = [lambda x: (x + 1).t(), lambda x: (x + 1)[:, ::2], lambda x: (x + 1)[0].expand(5, 6), lambda x: x[:0] + 1]
    program = region.returning(*[region.step(fn, x) for fn in fns])
    runner = runner_of(program)
    for _ in range(5):
        x = randn(4, 6)
        for mine, theirs in zip(runner(x), program.run(x), strict=True):
            assert torch.equal(mine, theirs)
            assert mine.stride() == theirs.stride()


def test_outputs_that_share_memory_share_it_afresh():
    for second in KINDS:
        region = Region()
        x = region.tensor("x")
        base = region.step(lambda x: x + 1, x)
        view = region.step(lambda b: b[1:], base, capture=second)
        bits = region.step(lambda b: b.view(torch.int32), base, capture=second)
        program = region.returning(base, view, bits, base)
        runner = runner_of(program)
        kept = []
        for _ in range(5):
            x = randn(4)
            b, v, i, again = runner(x)
            assert again is b
            assert torch.equal(b, x + 1)
            assert v.data_ptr() == b.data_ptr() + 4
            assert i.data_ptr() == b.data_ptr()
            b.fill_(3)
            assert torch.equal(v, torch.full((3,), 3.0))
            assert torch.equal(i.view(torch.float32), b)
            kept.append(b)
        assert len({b.data_ptr() for b in kept}) == 5


def test_argument_is_returned_as_itself_and_views_of_it_as_views():
    for how in KINDS:
        region = Region()
        state, x, w = region.tensor("state"), region.tensor("x"), region.static("w")
        same = region.step(lambda s: s.add_(1), state, mutates=[state], capture=how)
        view = region.step(lambda s: s[1:], same)
        of_copied = region.step(lambda x: x[::2], x)
        further = region.step(lambda v: v[:1], of_copied, capture=how)
        of_weight = region.step(lambda w: w.view(torch.int32), w, capture=how)
        total = region.step(lambda v: v * 2, view)
        program = region.returning(same, view, of_copied, further, of_weight, state, w, total)
        runner = runner_of(program)
        state, weight = torch.zeros(3), randn(2)
        for _ in range(6):
            x = randn(5)
            same, view, of_copied, further, of_weight, got_state, got_weight, total = runner(state, x, weight)
            assert same is state
            assert got_state is state
            assert got_weight is weight
            assert view.data_ptr() == state.data_ptr() + 4
            assert of_copied.data_ptr() == further.data_ptr() == x.data_ptr()
            assert torch.equal(of_copied, x[::2])
            assert of_weight.data_ptr() == weight.data_ptr()
            assert of_weight.dtype is torch.int32
            assert torch.equal(total, state[1:] * 2)
        assert runner.stats.replays == 3


def test_fresh_result_of_a_live_step_is_returned_as_it_is():
    region = Region()
    x = region.tensor("x")
    y = region.step(lambda x: x + 1, x)
    made = []
    z = region.step(lambda y: made.append(y * 2) or made[-1], y, capture=LIVE)
    end = region.step(lambda z: z + 1, z)
    through = region.step(lambda z: z[1:], z)
    runner = runner_of(region.returning(z, end, through))
    for _ in range(5):
        x = randn(2)
        z, end, through = runner(x)
        assert z is made[-1]
        assert through.data_ptr() == z.data_ptr() + 4
        assert torch.equal(end, (x + 1) * 2 + 1)


def test_live_view_of_a_captured_view_of_a_copied_argument_may_change_its_size():
    region = Region()
    k, x = region.size("k", in_key=False), region.tensor("x")
    tail = region.step(lambda x: x[1:], x)
    program = region.returning(
        region.step(lambda k, t: t[:k], k, tail, capture=LIVE), region.step(lambda t: t * 2, tail)
    )
    runner = runner_of(program)
    for k in (2, 2, 2, 2, 3, 1):
        x = randn(5)
        part, double = runner(k, x)
        assert torch.equal(part, x[1 : 1 + k])
        assert part.data_ptr() == x.data_ptr() + 4
        assert torch.equal(double, x[1:] * 2)


def test_captured_view_of_a_live_view_of_a_captured_view_of_a_copied_argument():
    region = Region()
    x, w = region.tensor("x"), region.static("w")
    tail = region.step(lambda x: x[1:], x)
    further = region.step(lambda t: t[1:], tail, capture=LIVE)
    again = region.step(lambda f: f[1:], further)
    program = region.returning(again, region.step(lambda f, w: f * w, further, w))
    runner = runner_of(program)
    w = torch.full((), 2.0)
    for _ in range(5):
        x = randn(5)
        view, double = runner(x, w)
        assert view.data_ptr() == x.data_ptr() + 12
        assert torch.equal(view, x[3:])
        assert torch.equal(double, x[2:] * 2)
    assert runner.stats.replays == 2


def test_live_results_that_are_one_object_come_back_as_one_object():
    region = Region()
    weight = region.static("w")
    seen = region.step(lambda w: w[:], weight)
    first = region.step(lambda w, view: view[:3], weight, seen, capture=LIVE)
    second = region.step(lambda each, w: each, first, weight, capture=LIVE)
    third = region.step(lambda each, w: each[:2], first, weight, capture=LIVE)
    runner, w = runner_of(region.returning(first, second, third)), torch.randn(5)
    for _ in range(6):
        one, same, other = runner(w)
        assert one is same
        assert other is not one
        assert torch.equal(one, w[:3])
        assert torch.equal(other, w[:2])
        assert one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() == w.untyped_storage().data_ptr()
    assert runner.stats.replays


def test_one_tensor_given_for_two_arguments_is_returned_as_itself():
    region = Region()
    w, x = region.static("w"), region.tensor("x")
    same = region.step(lambda x: x.add_(1), x, mutates=[x])
    through = region.step(lambda s, w: s, same, w, capture=LIVE)
    runner = runner_of(region.returning(through, w))
    both = torch.zeros(2)
    for _ in range(5):
        through, got = runner(both, both)
        assert through is both
        assert got is both
    assert runner.stats.replays == 2


def test_live_step_that_writes_into_a_captured_result():
    region = Region()
    x = region.tensor("x")
    out = region.step(torch.empty_like, x)
    y = region.step(lambda x: x * 3, x)
    done = region.step(lambda out, y: out.copy_(y), out, y, mutates=[out], capture=LIVE)
    program = region.returning(done, region.step(lambda d: d + 1, done), region.step(lambda o: o - 1, out))
    runner = runner_of(program)
    kept = []
    for _ in range(5):
        x = randn(2)
        done, more, less = runner(x)
        kept.append((x, done))
        assert torch.equal(more, x * 3 + 1)
        assert torch.equal(less, x * 3 - 1)
    assert all(torch.equal(done, x * 3) for x, done in kept)
