"""Fresh results of live steps that captured steps read."""

from __future__ import annotations

import pytest
import torch

from tests.cudagraph.regions import LIVE, Region, randn, runner_of, warm


def bridged(live):
    region = Region()
    k, x = region.size("k", in_key=False), region.tensor("x")
    y = region.step(lambda x: x + 1, x)
    z = region.step(live, k, y, capture=LIVE)
    return region.returning(region.step(lambda z: z.sum(0) * 2, z), y)


def test_fresh_result_crosses_into_the_next_segment():
    program = bridged(lambda k, y: y * k)
    runner = runner_of(program)
    for k in range(6):
        x = randn(2)
        assert all(map(torch.equal, runner(k, x), program.run(k, x)))
    assert runner.stats.replays == 3


def test_result_of_another_size_finishes_the_call_live_and_drops_the_plan():
    program = bridged(lambda k, y: y.expand(k, 2).contiguous())
    runner = runner_of(program)
    kept = []
    for k in (3, 3, 3, 3, 5, 3, 5):
        x = randn(2)
        kept.append((runner(k, x), program.run(k, x)))
    assert all(all(map(torch.equal, mine, theirs)) for mine, theirs in kept)
    assert not runner.stats.plans
    reason = "step_1 gave a result of another size or place than at capture"
    assert runner.stats.live_calls[reason] == 3
    assert runner.stats.replays == 1


def test_result_that_would_broadcast_is_not_taken():
    program = bridged(lambda k, y: (y * 3)[None].expand(k, 2))
    runner = runner_of(program)
    for k in (4, 4, 4, 4, 1):
        x = randn(2)
        assert all(map(torch.equal, runner(k, x), program.run(k, x)))


def test_live_view_of_a_copied_argument_is_bridged():
    region = Region()
    x = region.tensor("x")
    a = region.step(lambda x: x + 1, x)
    view = region.step(lambda x, a: x[1:], x, a, capture=LIVE)
    program = region.returning(region.step(lambda v, a: v * 2 + a[1:], view, a), view)
    runner = runner_of(program)
    for _ in range(5):
        x = randn(3)
        result, view = runner(x)
        assert torch.equal(result, x[1:] * 2 + (x + 1)[1:])
        assert view.data_ptr() == x.data_ptr() + 4
    assert runner.stats.replays == 2


def test_live_result_that_is_written_later_has_its_captured_readers_live():
    region = Region()
    x = region.tensor("x")
    y = region.step(lambda x: x + 1, x)
    z = region.step(lambda y: y * 2, y, capture=LIVE)
    w = region.step(lambda z: z.add_(1) * 3, z, mutates=[z])
    program = region.returning(region.step(lambda z, w: z + w, z, w, capture=LIVE), region.step(lambda w: w - 1, w))
    runner = runner_of(program)
    for _ in range(5):
        x = randn(2)
        assert all(map(torch.equal, runner(x), program.run(x)))
    assert runner.stats.plans[0].live["step_2"] == "result 0 of step_1 is written in place after it was made"


def test_in_place_live_step_that_returns_a_static_argument_needs_no_bridge():
    region = Region()
    cache, x = region.static("cache"), region.tensor("x")
    y = region.step(lambda x: x + 1, x)
    kept = region.step(lambda c, y: c.add_(y), cache, y, mutates=[cache], capture=LIVE)
    program = region.returning(region.step(lambda k: k * 2, kept))
    runner = runner_of(program)
    cache = torch.zeros(2)
    warm(runner, cache, torch.zeros(2))
    cache.zero_()
    assert torch.equal(runner(cache, torch.ones(2))[0], torch.full((2,), 4.0))
    assert "copy_(v" not in runner.stats.plans[0].source


def test_static_result_that_lies_elsewhere_finishes_the_call_live():
    region = Region()
    k, cache, x = region.size("k", in_key=False), region.static("cache"), region.tensor("x")
    y = region.step(lambda x: x + 1, x)
    kept = region.step(lambda k, c, y: c.add_(y) if k < 4 else c + y, k, cache, y, mutates=[cache], capture=LIVE)
    program = region.returning(region.step(lambda k: k * 2, kept), kept)
    runner = runner_of(program)
    cache, expected_cache = torch.zeros(2), torch.zeros(2)
    for k in range(6):
        x = randn(2)
        expected = program.run(k, expected_cache, x)
        assert all(map(torch.equal, runner(k, cache, x), expected))
        assert torch.equal(cache, expected_cache)
    assert runner.stats.replays == 1


def test_live_step_may_return_its_argument_in_one_call_and_a_fresh_tensor_in_the_next():
    region = Region()
    k, cache, x = region.size("k", in_key=False), region.static("cache"), region.tensor("x")
    y = region.step(lambda x: x + 1, x)
    kept = region.step(lambda k, c, y: c if k < 4 else c + y, k, cache, y, capture=LIVE)
    program = region.returning(kept, y)
    runner = runner_of(program)
    cache = randn(2)
    for k in range(6):
        x = randn(2)
        kept, _ = runner(k, cache, x)
        assert (kept is cache) == (k < 4)
        assert torch.equal(kept, program.run(k, cache, x)[0])
    assert runner.stats.replays == 3


def layers(count, keep=False):
    """A live step between each two captured ones; with ``keep`` the last step reads every live result again."""
    region = Region()
    n, x = region.size("n"), region.tensor("x")
    results = []
    for _ in range(count):
        x = region.step(lambda x: x + 1, x)
        x = region.step(lambda n, x: x * 2, n, x, capture=LIVE)
        results.append(x)
    read = results if keep else [x]
    return region.returning(region.step(lambda *read: sum(read), *read))


def bytes_of_bridges(runner):
    return sum(chunk.numel() for chunk in runner._maker.capture._bridges.chunks())


def call(runner, n):
    x = torch.randn(n, 2**16)  # 256 KiB a row
    for _ in range(3):
        (result,) = runner(n, x)
    assert torch.equal(runner(n, x)[0], runner.program.run(n, x)[0])
    assert result.shape == x.shape


def test_bridges_that_are_never_needed_together_share_memory():
    runner = runner_of(layers(12))
    call(runner, 8)
    assert bytes_of_bridges(runner) <= 3 * 8 * 2**18, "12 live results of 2 MiB each"


def test_plans_of_one_runner_share_their_bridges():
    runner = runner_of(layers(6))
    call(runner, 8)
    before = bytes_of_bridges(runner)
    for n in (4, 2, 6, 1):
        call(runner, n)
    assert bytes_of_bridges(runner) == before
    call(runner, 8), call(runner, 4)
    assert runner.stats.replays >= 5 + 8


def test_bridges_that_are_read_late_keep_their_memory():
    runner = runner_of(layers(5, keep=True))
    for n in (8, 2, 8, 4):
        call(runner, n)
    assert bytes_of_bridges(runner) >= 5 * 8 * 2**18


def test_chunks_go_with_the_last_plan():
    runner = runner_of(layers(3))
    call(runner, 2)
    runner.release()
    assert bytes_of_bridges(runner) == 0


def doubled_into(out, y):
    torch.mul(y, 2, out=out)


@pytest.mark.parametrize("into", [None, doubled_into])
def test_a_result_that_only_a_graph_would_have_read_is_there_when_the_call_finishes_live(into):
    region = Region()
    k, x = region.size("k", in_key=False), region.tensor("x")
    y = region.step(lambda x: x + 1, x)
    first = region.step(lambda y: y * 2, y, capture=LIVE, into=into)
    second = region.step(lambda k, y: y.expand(k, 2).contiguous(), k, y, capture=LIVE)
    program = region.returning(region.step(lambda a, b: a + b.sum(0), first, second))
    runner = runner_of(program)
    for k in (3, 3, 3, 3, 5):
        x = randn(2)
        assert all(map(torch.equal, runner(k, x), program.run(k, x)))
    assert runner.stats.replays == 1


def with_out_variant(read_live=False):
    region = Region()
    x = region.tensor("x")
    y = region.step(lambda x: x + 1, x)
    z = region.step(lambda y: y * 2, y, capture=LIVE, into=doubled_into)
    results = [region.step(lambda z: z.sum() * 3, z)]
    if read_live:
        results.append(region.step(lambda z: z - 1, z, capture=LIVE))
    return region.returning(*results)


def test_an_out_variant_writes_straight_into_the_bridge():
    program = with_out_variant()
    runner = runner_of(program)
    for _ in range(6):
        x = randn(2)
        assert all(map(torch.equal, runner(x), program.run(x)))
    assert runner.stats.replays == 3
    source = runner.stats.plans[0].source
    assert "live1(b2, c1)" in source
    assert "copy_(v" not in source


def test_a_result_that_live_steps_read_as_well_is_a_tensor_of_its_own():
    """The bridge's memory is overwritten by the next call, and by other bridges of this one."""
    program = with_out_variant(read_live=True)
    runner = runner_of(program)
    for _ in range(6):
        x = randn(2)
        assert all(map(torch.equal, runner(x), program.run(x)))
    assert "b2.copy_(v2)" in runner.stats.plans[0].source
