"""How each kind of input gets into the graph, and what happens when its address moves."""

from __future__ import annotations

import torch

from graphcap.cudagraph import Capture
from tests.cudagraph.regions import LIVE, Region, randn, runner_of, warm


def scaled():
    region = Region()
    w, x = region.static("w"), region.tensor("x")
    return region.returning(region.step(lambda w, x: w * x, w, x))


def test_weight_is_read_in_place_so_that_an_update_is_seen():
    weight = randn(3)
    runner = runner_of(scaled())
    warm(runner, weight, randn(3))
    weight.fill_(7)
    x = randn(3)
    assert torch.equal(runner(weight, x)[0], 7 * x)
    assert runner.stats.replays == 1
    assert runner.stats.bindings == {"w": "static", "x": "copied"}


def test_moved_weight_is_captured_again_once():
    """Field notes row 12: after a weight reload graphs read old addresses."""
    runner = runner_of(scaled())
    old, new, x = randn(3), randn(3), randn(3)
    warm(runner, old, x)
    for _ in range(3):
        assert torch.equal(runner(new, x)[0], new * x)
    assert (runner.stats.recaptures, runner.stats.replays) == (1, 2)


def test_weight_that_keeps_moving_is_copied_in_the_end():
    runner = runner_of(scaled())
    kept = [randn(3) for _ in range(8)]
    warm(runner, kept[0], randn(3))
    for weight in kept:
        x = randn(3)
        assert torch.equal(runner(weight, x)[0], weight * x)
    assert runner.stats.recaptures == 3
    assert runner.stats.bindings["w"] == "copied"


def test_large_weight_that_keeps_moving_has_its_readers_live():
    region = Region()
    w, x = region.static("w"), region.tensor("x")
    y = region.step(lambda w, x: w * x, w, x)
    runner = runner_of(region.returning(region.step(lambda y: y + 1, y)), max_copy_bytes=8)
    kept = [randn(3) for _ in range(8)]
    warm(runner, kept[0], randn(1))
    for weight in kept:
        x = randn(1)
        assert torch.equal(runner(weight, x)[0], weight * x + 1)
    assert runner.stats.recaptures == 3
    assert runner.stats.plans[0].live == {"step_0": "input w keeps moving and cannot be copied"}


def test_rare_moves_are_never_too_many():
    runner = runner_of(scaled())
    kept = [randn(3) for _ in range(5)]
    warm(runner, kept[0], randn(3))
    for weight in kept[1:]:
        for _ in range(70):
            x = randn(3)
            assert torch.equal(runner(weight, x)[0], weight * x)
    assert runner.stats.bindings["w"] == "static"
    assert runner.stats.recaptures == 4


def counting(capture=Capture.ALWAYS):
    region = Region()
    state, x = region.tensor("state"), region.tensor("x")
    y = region.step(lambda s, x: s.add_(x) * 2, state, x, mutates=[state])
    z = region.step(lambda y: y + 1, y, capture=capture)
    return region.returning(z, region.step(lambda s, z: s.mul_(2) + z, state, z, mutates=[state]))


def test_written_input_that_keeps_moving_is_copied_in_and_out():
    for capture in (Capture.ALWAYS, LIVE):
        program = counting(capture)
        runner = runner_of(program)
        states = [randn(2) for _ in range(8)]
        for state in states:
            x = randn(2)
            expected_state = state.clone()
            expected = program.run(expected_state, x)
            assert all(map(torch.equal, runner(state, x), expected))
            assert torch.equal(state, expected_state)
        assert runner.stats.bindings == {"state": "copied in and out", "x": "copied"}
        assert runner.stats.replays == 3


def test_written_input_read_by_a_live_step_goes_live_when_it_keeps_moving():
    region = Region()
    state, x = region.tensor("state"), region.tensor("x")
    y = region.step(lambda s, x: s.add_(x) * 2, state, x, mutates=[state])
    z = region.step(lambda s, y: s + y, state, y, capture=LIVE)
    program = region.returning(region.step(lambda z: z * 3, z))
    runner = runner_of(program)
    states = [randn(2) for _ in range(8)]
    for state in states:
        x = randn(2)
        expected_state = state.clone()
        expected = program.run(expected_state, x)
        assert torch.equal(runner(state, x)[0], expected[0])
        assert torch.equal(state, expected_state)
    assert runner.stats.plans[0].live["step_0"] == "input state keeps moving and cannot be copied"


def test_large_input_is_used_in_place():
    runner = runner_of(scaled(), max_copy_bytes=8)
    weight, x = randn(3), randn(3)
    warm(runner, weight, x)
    x.fill_(2)
    assert torch.equal(runner(weight, x)[0], weight * 2)
    assert runner.stats.bindings["x"] == "static"


def test_declared_static_argument_is_used_in_place():
    runner = runner_of(scaled(), static_args=("x",))
    weight, x = randn(3), randn(3)
    warm(runner, weight, x)
    assert runner.stats.bindings["x"] == "static"
    x.fill_(2)
    assert torch.equal(runner(weight, x)[0], weight * 2)


def test_input_of_live_steps_alone_is_passed_through():
    region = Region()
    cache, x = region.tensor("cache"), region.tensor("x")
    y = region.step(lambda x: x + 1, x)
    program = region.returning(region.step(lambda c, y: c.add_(y), cache, y, mutates=[cache], capture=LIVE))
    runner = runner_of(program)
    for _ in range(5):
        cache, x = randn(2), randn(2)
        expected = cache + (x + 1)
        assert runner(cache, x)[0] is cache
        assert torch.equal(cache, expected)
    assert runner.stats.bindings == {"cache": "by reference", "x": "copied"}
    assert runner.stats.recaptures == 0


def test_captured_step_mutates_an_input_through_a_view():
    region = Region()
    state, x = region.tensor("state"), region.tensor("x")
    half = region.step(lambda s: s[:2], state)
    y = region.step(lambda h, x: h.add_(x) + 0, half, x, mutates=[half])
    program = region.returning(y)
    runner = runner_of(program)
    state, expected_state = torch.zeros(4), torch.zeros(4)
    for _ in range(5):
        x = randn(2)
        expected = program.run(expected_state, x)
        assert torch.equal(runner(state, x)[0], expected[0])
        assert torch.equal(state, expected_state)
    assert runner.stats.bindings["state"] == "static"


def test_arguments_that_share_memory_are_not_copied_apart_when_one_is_written():
    region = Region()
    a, b = region.tensor("a"), region.tensor("b")
    region.step(lambda a: a.add_(1), a, mutates=[a])
    program = region.returning(region.step(lambda b: b * 2, b))
    runner = runner_of(program)
    whole = torch.zeros(4)
    for call in range(5):
        got = runner(whole[:3], whole[1:])
        assert torch.equal(got[0], torch.tensor([2.0, 2.0, 0.0]) * (call + 1))
    assert runner.stats.bindings == {"a": "static", "b": "static"}
    assert runner.stats.replays == 2


def test_arguments_that_begin_to_share_memory_are_noticed():
    region = Region()
    a, b = region.tensor("a"), region.tensor("b")
    region.step(lambda a: a.add_(1), a, mutates=[a])
    program = region.returning(region.step(lambda b: b * 2, b))
    runner = runner_of(program)
    a = torch.zeros(3)
    warm(runner, a, torch.zeros(3))
    a.zero_()
    for call in range(6):
        assert torch.equal(runner(a, a)[0], torch.full((3,), 2.0 * (call + 1)))


def test_arguments_that_were_one_object_at_capture_and_are_two_later():
    region = Region()
    x, y = region.tensor("x"), region.tensor("y")
    program = region.returning(region.step(lambda y, x: y, y, x), region.step(lambda x, y: x - y, x, y))
    runner = runner_of(program)
    both = randn(5)
    same = both[:3]
    warm(runner, same, same)
    for x, y in [(randn(3), randn(3)), (both[:3], both[2:]), (same, same)] * 3:
        got = runner(x, y)
        assert got[0] is y
        assert torch.equal(got[1], x - y)


def test_changed_layout_under_the_same_key_is_right_and_gets_its_own_plan_in_the_end():
    region = Region()
    x = region.tensor("x")
    runner = runner_of(region.returning(region.step(lambda x: x * 2, x)))
    warm(runner, randn(3, 4))
    for _ in range(6):
        x = randn(4, 3).t()
        assert torch.equal(runner(x)[0], x * 2)
    for _ in range(6):
        x = randn(5, 4)
        assert torch.equal(runner(x)[0], x * 2)
    reason = "an input has another layout or shares other memory than at capture"
    assert runner.stats.live_calls[reason] == 6
    assert runner.stats.replays == 2


def test_copied_inputs_of_odd_layouts():
    layouts = {
        "expanded": lambda: randn(1, 3).expand(4, 3),
        "unfolded": lambda: randn(6).unfold(0, 3, 1),
        "sliced": lambda: randn(4, 6)[:, ::2],
        "transposed": lambda: randn(3, 4).t(),
        "empty": lambda: randn(0, 3),
        "scalar": lambda: torch.randn(()),
        "offset": lambda: randn(7)[3:],
        "bool": lambda: randn(3) > 0,
        "half": lambda: randn(3).half(),
    }
    for make in layouts.values():
        region = Region()
        x, y = region.tensor("x"), region.tensor("y")
        runner = runner_of(region.returning(region.step(lambda x, y: x.clone() + y, x, y)))
        for _ in range(5):
            x, y = make(), torch.randn(())
            assert torch.equal(runner(x, y)[0], x.clone() + y)
        assert runner.stats.replays == 2


def test_inputs_that_require_grad_or_are_inference_tensors():
    with torch.inference_mode():
        frozen = randn(3)
    for given in (frozen, randn(3).requires_grad_()):
        runner = runner_of(scaled())
        with torch.no_grad():
            for weight, x in [(given, randn(3)), (randn(3), given), (given, given)] * 4:
                assert torch.equal(runner(weight, x)[0], weight * x)


def test_growing_arena_leaves_earlier_plans_alone():
    region = Region()
    n, x = region.size("n"), region.tensor("x")
    runner = runner_of(region.returning(region.step(lambda n, x: x + n, n, x)))
    for n in (2, 4096, 8):
        warm(runner, n, randn(n))
    for n in (2, 8, 4096, 2):
        x = randn(n)
        assert torch.equal(runner(n, x)[0], x + n)
    assert runner.stats.replays == 4
