"""``outputs="clone"``, ``"static"`` and ``"ring:N"``: the same values in every way, each for as long as it promises."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from graphcap.cudagraph import Constant, device_for
from graphcap.cudagraph.hardware.simulated import SimulatedDevice
from graphcap.cudagraph.recording.arena import aligned_block
from graphcap.cudagraph.replaying.handout import Ring
from tests.cudagraph.regions import LIVE, Region, randn, runner_of, warm
from tests.cudagraph.test_random_programs import copies, relations

POLICIES = ["clone", "static", "ring:1", "ring:2", "ring:3"]
NOT_CLONES = POLICIES[1:]


def doubled(x):
    return x * 2


def two_outputs_in_one_memory(region, x):
    base = region.step(lambda x: x + 1, x)
    tail = region.step(lambda b: b.view(-1)[3:], base)
    return base, tail, region.step(lambda b: b.view(torch.int32), base), region.step(lambda t: t[1:], tail)


def live_view_of_a_captured_result(region, x):
    base = region.step(lambda x: x + 1, x)
    view = region.step(lambda b: b.t(), base, capture=LIVE)
    return view, base, region.step(lambda v: v[1:], view), region.step(doubled, view)


def only_a_part_of_a_result(region, x):
    return (region.step(lambda x: (x + 1)[1:, ::2], x),)


def an_output_twice(region, x):
    base = region.step(doubled, x)
    other = region.step(lambda x: x - 1, x)
    return base, other, base, Constant(None), base


def nothing_in_it(region, x):
    empty = region.step(lambda x: x[:0] + 1, x)
    part = region.step(lambda x: (x + 1)[:, :0], x)
    return empty, part, region.step(doubled, x), region.step(lambda e: e.t(), empty)


def arguments_and_views_of_them(region, x):
    tail = region.step(lambda x: x[1:], x)
    return x, tail, region.step(lambda t: t.t(), tail, capture=LIVE), region.step(doubled, tail)


def an_argument_that_is_written(region, x):
    written = region.step(lambda x: x.add_(1), x, mutates=[x])
    return written, region.step(doubled, written), region.step(lambda w: w[0], written)


def fresh_results_of_live_steps(region, x):
    y = region.step(doubled, x)
    z = region.step(lambda y: y + 1, y, capture=LIVE)
    return z, region.step(lambda z: z * 3, z), region.step(lambda z: z[1:], z), y


def several_dtypes(region, x):
    kinds = (torch.float64, torch.int32, torch.bool, torch.bfloat16, torch.float32)
    return tuple(region.step(lambda x, dtype=dtype: (x * 4).to(dtype), x) for dtype in kinds)


def strided(region, x):
    fns = [lambda x: (x + 1).t(), lambda x: (x + 1)[0].expand(3, 6), lambda x: x.sum(), lambda x: (x + 1)[None]]
    return tuple(region.step(fn, x) for fn in fns)


def memory_used_again(region, x):
    """Each result but the last is released, so that a later one may lie where it was."""
    for _ in range(4):
        x = region.step(lambda x: x + 1, x)
        x = region.step(lambda x: x * 2, x, capture=LIVE)
        x = region.step(lambda x: x - 1, x)
    return (x,)


SHAPES = [
    two_outputs_in_one_memory,
    live_view_of_a_captured_result,
    only_a_part_of_a_result,
    an_output_twice,
    nothing_in_it,
    arguments_and_views_of_them,
    an_argument_that_is_written,
    fresh_results_of_live_steps,
    several_dtypes,
    strided,
    memory_used_again,
]


@pytest.mark.parametrize("outputs", POLICIES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
def test_every_call_is_like_a_live_one(shape, outputs):
    region = Region()
    program = region.returning(*shape(region, region.tensor("x")))
    runner = runner_of(program, outputs=outputs)
    for call in range(8):
        args = [randn(4, 6)]
        theirs = copies(args)
        expected, got = program.run(*theirs), runner(*args)
        for mine, other in zip((*got, *args), (*expected, *theirs), strict=True):
            assert type(mine) is type(other)
            if other is not None:
                torch.testing.assert_close(mine, other, rtol=0, atol=0)
                assert (mine.stride(), mine.requires_grad) == (other.stride(), other.requires_grad)
        tensors = [each for each in got if each is not None], [each for each in expected if each is not None]
        assert relations(args, filled(tensors[0])) == relations(theirs, filled(tensors[1])), call
    assert runner.stats.replays >= 3
    assert not runner.stats.failures


def filled(tensors):
    """Tensors without elements share the address 0, which says nothing."""
    return [each for each in tensors if each.numel()]


# -- how long an output lasts -----------------------------------------------------------------------------------------


def doubling(num_outputs=1):
    region = Region()
    x = region.tensor("x")
    return region.returning(*[region.step(lambda x, by=by: x * by, x) for by in range(2, 2 + num_outputs)])


@pytest.mark.parametrize(("outputs", "lifetime"), [("static", 1), ("ring:1", 1), ("ring:2", 2), ("ring:3", 3)])
def test_memory_is_used_again_after_the_promised_number_of_replays(outputs, lifetime):
    """Field notes row 25: nobody can say how long an output lasts."""
    runner = runner_of(doubling(2), outputs=outputs)
    warm(runner, randn(4))
    given, kept = [], []
    for _ in range(4 * lifetime):
        given.append(randn(4))
        kept.append(runner(given[-1]))
        for x, (twice, thrice) in zip(given[-lifetime:], kept[-lifetime:], strict=True):
            assert torch.equal(twice, x * 2)
            assert torch.equal(thrice, x * 3)
    assert [pair[0].data_ptr() for pair in kept[lifetime:]] == [pair[0].data_ptr() for pair in kept[:-lifetime]]
    assert len({each.data_ptr() for pair in kept for each in pair}) == 2 * lifetime


def test_static_output_is_what_the_graph_writes():
    runner = runner_of(doubling(), outputs="static")
    warm(runner, randn(4))
    (plan,) = runner._table.plans.values()
    (out,) = runner(randn(4))
    assert out.data_ptr() in plan.recorded.memory.pool
    assert ".clone()" not in plan.stats.source


@pytest.mark.parametrize("outputs", NOT_CLONES)
def test_the_capturing_call_follows_the_policy_and_live_calls_give_fresh_tensors(outputs):
    runner, x = runner_of(doubling(), outputs=outputs), randn(4)
    calls = [runner(x)[0] for _ in range(3)]
    lifetime = runner._maker.capture._policy.lifetime
    assert len({each.data_ptr() for each in calls}) == 3, "two live ones and the captured one"
    later = [runner(x)[0] for _ in range(lifetime)]
    assert later[-1].data_ptr() == calls[-1].data_ptr()


@pytest.mark.parametrize("outputs", NOT_CLONES)
def test_another_plan_leaves_the_outputs_alone(outputs):
    """A second model, another size of the same one: neither writes into what a call has returned."""
    device = SimulatedDevice()
    first, second = (runner_of(doubling(), device, outputs=each) for each in (outputs, "clone"))
    region = Region()
    region.size("n")
    x = region.tensor("x")
    sized = runner_of(region.returning(region.step(doubled, x)), device, outputs=outputs)
    for _ in range(4):
        for n in (2, 3):
            sized(n, randn(n))
    warm(first, x := randn(4))
    (out,), (of_two,) = first(x), sized(2, y := randn(2))
    for _ in range(4):
        second(randn(4))
        sized(3, randn(3))
    assert torch.equal(out, x * 2)
    assert torch.equal(of_two, y * 2)
    assert first.stats.replays == 1


@pytest.mark.parametrize("outputs", NOT_CLONES)
def test_an_output_outlives_its_plan(outputs):
    runner = runner_of(doubling(2), outputs=outputs)
    warm(runner, randn(1000))
    (plan,) = runner._table.plans.values()
    gone = weakref.ref(plan.recorded.segments[0])
    x = randn(1000)
    twice, thrice = runner(x)
    del plan
    runner.release()
    gc.collect()
    assert gone() is None
    junk = [torch.full((1000,), 7.0) for _ in range(50)]
    assert torch.equal(twice, x * 2)
    assert torch.equal(thrice, x * 3)
    del junk


def test_a_captured_view_of_a_live_view_outlives_its_plan():
    """The captured step saw the live step's result through a tensor that owns nothing."""
    region = Region()
    base = region.step(lambda x: x * 2, region.tensor("x"))
    tail = region.step(lambda b: b[1:], base, capture=LIVE)
    runner = runner_of(region.returning(region.step(lambda t: t[1:], tail)), SimulatedDevice(), outputs="static")
    warm(runner, x := randn(1000))
    (out,) = runner(x)
    (memory,) = [StorageWeakRef(block.storage) for block in runner.device._pool().blocks.values()]
    runner.release()
    gc.collect()
    assert not memory.expired()
    assert torch.equal(out, x[2:] * 2)


def test_memory_of_a_dropped_plan_goes_with_the_last_output():
    device = SimulatedDevice()
    runner = runner_of(doubling(), device, outputs="static")
    warm(runner, x := randn(1000))
    (out,) = runner(x)
    (memory,) = [StorageWeakRef(block.storage) for block in device._pool().blocks.values()]
    runner.release()
    gc.collect()
    assert device.used_bytes() == 0, "the graph is gone"
    assert not memory.expired()
    del out
    assert memory.expired()


@pytest.mark.parametrize("outputs", POLICIES)
def test_a_replay_that_goes_on_live_returns_fresh_tensors(outputs):
    region = Region()
    k, x = region.size("k", in_key=False), region.tensor("x")
    y = region.step(lambda x: x * 2, x)
    z = region.step(lambda y, k: y[:k] + 1, y, k, capture=LIVE)
    program = region.returning(y, region.step(lambda z: z * 3, z), region.step(lambda y: y[1:], y))
    runner = runner_of(program, outputs=outputs)
    kept = []
    for k in (3, 3, 3, 3, 2, 3, 2):
        args = k, randn(4)
        expected, got = program.run(*args), runner(*args)
        assert all(map(torch.equal, got, expected))
        assert relations([], got) == relations([], expected)
        kept.append((got, expected))
    assert runner.stats.replays == 1
    assert not runner.stats.plans
    assert all(all(map(torch.equal, got, expected)) for got, expected in kept[-3:])


def test_a_ring_without_memory_is_a_failed_capture_and_the_call_is_right(monkeypatch):
    def no_memory(*args):
        raise torch.OutOfMemoryError("no memory for a ring")

    monkeypatch.setattr("graphcap.cudagraph.replaying.handout.aligned_block", no_memory)
    runner = runner_of(doubling(), outputs="ring:2")
    x = randn(4)
    with pytest.warns(UserWarning, match="no memory for a ring"):
        results = [runner(x) for _ in range(6)]
    assert all(torch.equal(twice, x * 2) for (twice,) in results)
    assert not runner.stats.plans


# -- what a caller may do with one ------------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", POLICIES)
def test_changes_to_one_output_object_are_not_seen_by_the_next_call(outputs):
    runner = runner_of(doubling(), outputs=outputs)
    warm(runner, randn(4, 6))
    weight = torch.ones(6, 4, requires_grad=True)
    for _ in range(4):
        x = randn(4, 6)
        (out,) = runner(x)
        assert out.shape == (4, 6)
        assert out.is_leaf
        assert not out.requires_grad
        assert not out._is_view()
        assert torch.equal(out, x * 2)
        out.t_()
        out.mul_(weight)
        assert out.grad_fn is not None
        out.note = "mine"
        (again,) = runner(x)
        assert not hasattr(again, "note")


@pytest.mark.parametrize("outputs", NOT_CLONES)
def test_memory_cannot_be_taken_from_under_the_graph(outputs):
    runner = runner_of(doubling(), outputs=outputs)
    warm(runner, randn(4))
    (out,) = runner(x := randn(4))
    with pytest.raises(RuntimeError, match="not resizable"):
        out.resize_(1000)
    with pytest.raises(RuntimeError, match="not resizable"):
        out.untyped_storage().resize_(0)
    assert torch.equal(runner(x)[0], x * 2)


@pytest.mark.parametrize(("outputs", "lifetime"), [("static", 1), ("ring:2", 2)])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_backward_through_an_overwritten_output_is_refused(outputs, lifetime, mode):
    """A frozen model in front of a trained one: autograd has saved the output for the gradient of the weight."""
    runner = runner_of(doubling(), outputs=outputs)
    warm(runner, randn(4))
    weight = torch.ones(4, requires_grad=True)

    def loss_after(num_replays):
        with mode():
            (out,) = runner(x := randn(4))
        loss = (out * weight).sum()
        with mode():
            for _ in range(num_replays):
                runner(randn(4))
        weight.grad = None
        loss.backward()
        assert torch.equal(weight.grad, x * 2)

    loss_after(lifetime - 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss_after(lifetime)


# -- an output as the next argument ------------------------------------------------------------------------------------


def read_by_a_live_step_alone(region, x, scale):
    y = region.step(lambda s: s + 1, scale)
    return y, region.step(lambda y, x: y * x, y, x, capture=LIVE)


def read_by_a_live_step_too(region, x, scale):
    y = region.step(lambda s, x: s + x, scale, x)
    return y, region.step(lambda y, x: y * x, y, x, capture=LIVE)


def written(region, x, scale):
    region.step(lambda x: x.add_(1), x, mutates=[x])
    return (region.step(lambda s: s * 2, scale),)


@pytest.mark.parametrize("outputs", POLICIES)
@pytest.mark.parametrize("shape", [read_by_a_live_step_alone, read_by_a_live_step_too, written])
def test_an_argument_may_be_an_earlier_output(shape, outputs):
    """A replay of ``static`` would overwrite these arguments while it reads them: such calls run without the graph."""
    region = Region()
    program = region.returning(*shape(region, region.tensor("x"), region.tensor("scale")))
    runner = runner_of(program, outputs=outputs)
    x = randn(4)
    for _ in range(16):
        scale = randn(4)
        expected, got = program.run(x.clone(), scale), runner(x, scale)
        assert all(map(torch.equal, got, expected))
        x = got[0]
    assert runner.stats.replays >= 2


@pytest.mark.parametrize("outputs", POLICIES)
def test_a_loop_that_feeds_back_what_is_copied_in_is_replayed_every_time(outputs):
    runner = runner_of(doubling(), outputs=outputs)
    x = expected = randn(4)
    for _ in range(8):
        (x,), expected = runner(x), expected * 2
        assert torch.equal(x, expected)
    assert runner.stats.replays == 5


# -- a ring over parts ------------------------------------------------------------------------------------------------


def test_parts_of_a_ring_take_their_turns_together():
    device = SimulatedDevice()
    block = aligned_block(device, 4 * 15).view(torch.float32)[3:].view(4, 3)
    ring = Ring([block], 2, device)
    whole, rows = ring.over([block]), ring.over([block[1:3]])
    block.copy_(torch.arange(12.0).view(4, 3))
    (first,), (second,) = whole(), rows()
    block.fill_(5)
    assert torch.equal(first, torch.arange(12.0).view(4, 3))
    assert torch.equal(second, first[1:3])
    (third,), (fourth,) = whole(), whole()
    assert third.data_ptr() == first.data_ptr()
    assert fourth[1:3].data_ptr() == second.data_ptr()
    assert torch.equal(first, block)


# -- the real thing ---------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("outputs", POLICIES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
def test_every_call_is_like_a_live_one_on_cuda(shape, outputs):
    device, _ = device_for({torch.device("cuda", 0)}, simulate=False)
    region = Region()
    program = region.returning(*shape(region, region.tensor("x")))
    runner = runner_of(program, device, outputs=outputs)
    for _ in range(8):
        args = [torch.randn(4, 6, device="cuda")]
        theirs = [args[0].clone()]
        expected, got = program.run(*theirs), runner(*args)
        for mine, other in zip((*got, *args), (*expected, *theirs), strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=0)
            assert other is None or mine.stride() == other.stride()
        found = relations(args, filled([each for each in got if each is not None]))
        assert found == relations(theirs, filled([each for each in expected if each is not None]))
    assert runner.stats.replays >= 3
    runner.release()


@pytest.mark.gpu
@pytest.mark.parametrize("outputs", NOT_CLONES)
def test_outputs_on_cuda_outlive_other_plans_and_their_own(outputs):
    device, _ = device_for({torch.device("cuda", 0)}, simulate=False)
    first, second = (runner_of(doubling(), device, outputs=each) for each in (outputs, "clone"))
    warm(first, torch.randn(2**20, device="cuda"))
    x = torch.randn(2**20, device="cuda")
    (out,) = first(x)
    for size in (2**20, 2**18):
        for _ in range(4):
            second(torch.randn(size, device="cuda"))
    assert torch.equal(out, x * 2)
    first.release()
    second.release()
    gc.collect()
    torch.cuda.empty_cache()
    junk = [torch.full((2**20,), 7.0, device="cuda") for _ in range(64)]
    warm(second, torch.randn(2**20, device="cuda"))
    second(torch.randn(2**20, device="cuda"))
    assert torch.equal(out, x * 2)
    second.release()
    del junk


@pytest.mark.gpu
def test_nothing_is_allocated_by_a_replay_on_cuda():
    device, _ = device_for({torch.device("cuda", 0)}, simulate=False)
    for outputs in ("static", "ring:2"):
        runner = runner_of(doubling(3), device, outputs=outputs)
        x = torch.randn(1000, device="cuda")
        warm(runner, x, calls=5)
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        for _ in range(3):
            runner(x)
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
        runner.release()
