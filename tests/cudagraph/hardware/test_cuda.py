"""The same on real CUDA graphs: values, effects, memory, streams, generators, and the state after a failed capture."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

from graphcap.cudagraph import Capture, device_for
from graphcap.cudagraph.hardware.cuda import CudaDevice
from tests.cudagraph.regions import LIVE, Region, runner_of, warm

pytestmark = pytest.mark.gpu


@pytest.fixture
def device(monkeypatch):
    """Every segment stays a graph, however small: what pays is another test's matter."""
    monkeypatch.setattr(CudaDevice, "stopwatch", None)
    found, reason = device_for({torch.device("cuda", 0), torch.device("cpu")}, simulate=False)
    assert found is not None, reason
    return found


def randn(*size, dtype=torch.float32):
    return torch.randn(*size, device="cuda", dtype=dtype)


def layered(num_layers: int, attention=LIVE):
    """``[n, 64]`` through layers, each cut by an op that looks at all rows, and a counter that every call raises."""
    region = Region()
    region.size("n")
    count = region.static("count")
    weights = [(region.static(f"w{i}"), region.static(f"b{i}")) for i in range(num_layers)]
    x = region.tensor("x")
    region.step(lambda c: c.add_(1), count, mutates=[count])
    for w, b in weights:
        h = region.step(lambda x, w, b: torch.relu(torch.nn.functional.linear(x, w, b)), x, w, b)
        a = region.step(lambda h: torch.softmax(h @ h.t(), -1) @ h, h, capture=attention)
        x = region.step(lambda a, h: a + h, a, h)
    return region.returning(x)


def parameters(num_layers: int):
    return [t for _ in range(num_layers) for t in (randn(64, 64) / 8, randn(64))]


@pytest.mark.parametrize("attention", [LIVE, Capture.FULL, Capture.ALWAYS])
@pytest.mark.parametrize("mode", ["PIECEWISE", "FULL"])
def test_values_and_effects_over_several_sizes(device, mode, attention):
    program = layered(4, attention)
    runner = runner_of(program, device, cudagraph_mode=mode)
    weights, count, expected_count = parameters(4), torch.zeros(1, device="cuda"), torch.zeros(1, device="cuda")
    kept = []
    for call in range(24):
        n = (3, 17, 64)[call % 3]
        x = randn(n, 64)
        (expected,) = program.run(n, expected_count, *weights, x)
        (got,) = runner(n, count, *weights, x)
        kept.append((got, expected))
    assert torch.equal(count, expected_count)
    for got, expected in kept:
        torch.testing.assert_close(got, expected)
    assert runner.stats.replays == 24 - 9
    captured_attention = attention is Capture.ALWAYS or (attention is Capture.FULL and mode == "FULL")
    assert [plan.num_segments for plan in runner.stats.plans] == [1 if captured_attention else 5] * 3
    runner.release()


def test_memory_is_reused_after_the_last_reader(device):
    """Field notes row 11, on a GPU."""

    def grown(num_layers):
        program = layered(num_layers)
        runner = runner_of(program, device)
        args = [4096, torch.zeros(1, device="cuda"), *parameters(num_layers)]
        x = randn(4096, 64)
        for _ in range(2):
            runner(*args, x)
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        runner(*args, x)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        grown = torch.cuda.memory_reserved() - before
        runner.release()
        return grown

    grown(1)
    # Three times the layers need the memory of their cross-segment tensors (1 MiB each) once, not three times.
    assert grown(12) <= grown(4) + 4 * 2**20


def test_fresh_live_result_is_bridged(device):
    region = Region()
    k, x = region.size("k", in_key=False), region.tensor("x")
    y = region.step(lambda x: x + 1, x)
    z = region.step(lambda k, y: y * k, k, y, capture=LIVE)
    program = region.returning(region.step(lambda y, z: y - z, y, z), z)
    runner = runner_of(program, device)
    kept = []
    for k in range(8):
        x = randn(1000)
        kept.append((runner(k, x), program.run(k, x)))
    assert all(all(map(torch.equal, got, expected)) for got, expected in kept)
    assert runner.stats.replays == 5


def syncing():
    region = Region()
    state, x = region.tensor("state"), region.tensor("x")
    a = region.step(lambda s, x: s.add_(x) * 2, state, x, mutates=[state])
    b = region.step(lambda s, a: s.add_(1) * float(a.sum()), state, a, mutates=[state])
    return region.returning(region.step(lambda b: b @ b + 1, b))


def test_device_is_sound_after_a_failed_capture(device):
    program = syncing()
    runner = runner_of(program, device)
    state, expected_state = torch.zeros(8, 8, device="cuda"), torch.zeros(8, 8, device="cuda")
    torch.manual_seed(5)
    first_draws = torch.rand(4, device="cuda"), torch.rand(4, device="cuda")
    torch.manual_seed(5)
    assert torch.equal(torch.rand(4, device="cuda"), first_draws[0])
    for call in range(6):
        x = torch.full((8, 8), float(call), device="cuda")
        (expected,) = program.run(expected_state, x)
        (got,) = runner(state, x)
        torch.testing.assert_close(got, expected)
        assert torch.equal(state, expected_state)
        if call == 2:
            assert len(runner.stats.failures) == 1
            assert torch.equal(torch.rand(4, device="cuda"), first_draws[1]), "the generator went on"
            held = [torch.empty(2**20, device="cuda") for _ in range(8)]
            del held
            torch.cuda.empty_cache()
    (plan,) = runner.stats.plans
    assert list(plan.live) == ["step_1"]
    assert len(runner.stats.failures) == 1
    torch.manual_seed(5)
    assert torch.equal(torch.rand(4, device="cuda"), first_draws[0])


def test_plans_from_before_a_failed_capture_go_on(device):
    program = layered(2)
    before = runner_of(program, device)
    args = [5, torch.zeros(1, device="cuda"), *parameters(2)]
    warm(before, *args, randn(5, 64))
    broken = runner_of(syncing(), device)
    for _ in range(5):
        broken(torch.zeros(8, 8, device="cuda"), randn(8, 8))
    assert broken.stats.failures
    x = randn(5, 64)
    torch.testing.assert_close(before(*args, x)[0], program.run(*args, x)[0])
    assert before.stats.replays == 1


def test_random_numbers_differ_between_replays_and_follow_the_seed(device):
    region = Region()
    x = region.tensor("x")
    runner = runner_of(region.returning(region.step(torch.rand_like, x)), device)
    x = randn(64)
    warm(runner, x)
    torch.manual_seed(1)
    a, b = runner(x)[0], runner(x)[0]
    torch.manual_seed(1)
    again = runner(x)[0]
    assert not torch.equal(a, b)
    assert torch.equal(a, again)


def test_replays_on_several_streams_wait_for_each_other(device):
    program = layered(3)
    runner = runner_of(program, device)
    args = [512, torch.zeros(1, device="cuda"), *parameters(3)]
    warm(runner, *args, randn(512, 64))
    streams = [torch.cuda.Stream() for _ in range(3)]
    inputs = [randn(512, 64) for _ in range(30)]
    expected = [program.run(*args, x)[0] for x in inputs]
    torch.cuda.synchronize()
    got = []
    for call, x in enumerate(inputs):
        with torch.cuda.stream(streams[call % 3]):
            got.append(runner(*args, x)[0])
    torch.cuda.synchronize()
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_threads_with_two_programs(device):
    programs = [layered(2), layered(3)]
    weights = [parameters(2), parameters(3)]
    runners = [runner_of(program, device) for program in programs]
    errors = []

    def work(seed):
        try:
            stream = torch.cuda.Stream()
            generator = torch.Generator("cuda").manual_seed(seed)
            with torch.cuda.stream(stream), torch.no_grad():
                counts = [torch.zeros(1, device="cuda") for _ in range(2)]
                for call in range(25):
                    which, n = call % 2, (4, 32)[seed % 2]
                    x = torch.randn(n, 64, device="cuda", generator=generator)
                    (got,) = runners[which](n, shared[which], *weights[which], x)
                    (expected,) = programs[which].run(n, counts[which], *weights[which], x)
                    torch.testing.assert_close(got, expected)
        except Exception as error:
            errors.append(error)

    shared = [torch.zeros(1, device="cuda") for _ in range(2)]
    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert all(len(runner.stats.plans) == 2 for runner in runners)


def test_moved_weights_are_captured_again(device):
    program = layered(2)
    runner = runner_of(program, device)
    count = torch.zeros(1, device="cuda")
    first = parameters(2)
    for _ in range(2):  # the two calls before the capture
        runner(5, count, *first, randn(5, 64))
    for _ in range(2):
        weights = parameters(2)
        for _ in range(3):
            x = randn(5, 64)
            torch.testing.assert_close(runner(5, count, *weights, x)[0], program.run(5, count, *weights, x)[0])
    assert (runner.stats.recaptures, runner.stats.replays) == (1, 4)


@pytest.mark.parametrize(
    ("first", "second"), [(torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)]
)
def test_capture_in_one_mode_and_replay_in_the_other(device, first, second):
    program = layered(2)
    runner = runner_of(program, device)
    args = [5, torch.zeros(1, device="cuda"), *parameters(2)]
    for mode in (first, second, first):
        with mode():
            for _ in range(4):
                x = randn(5, 64)
                torch.testing.assert_close(runner(*args, x)[0], program.run(*args, x)[0])
    assert runner.stats.replays == 9


def test_reader_of_a_cpu_tensor_runs_live(device):
    region = Region()
    lengths, x = region.tensor("lengths"), region.tensor("x")
    y = region.step(lambda x: x + 1, x)
    z = region.step(lambda lengths, y: y * int(lengths.max()), lengths, y)
    program = region.returning(region.step(lambda z: z - 1, z))
    runner = runner_of(program, device)
    for call in range(6):
        lengths, x = torch.tensor([call, 1]), randn(4)
        assert torch.equal(runner(lengths, x)[0], program.run(lengths, x)[0])
    assert runner.stats.plans[0].live == {"step_1": "input lengths is on cpu, the graph is on cuda:0"}


def test_call_inside_a_capture_of_the_user_becomes_part_of_it(device):
    program = layered(1, Capture.ALWAYS)
    runner = runner_of(program, device)
    args = [5, torch.zeros(1, device="cuda"), *parameters(1)]
    x = randn(5, 64)
    warm(runner, *args, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (got,) = runner(*args, x)
    x.copy_(randn(5, 64))
    graph.replay()
    torch.testing.assert_close(got, program.run(*args, x)[0])


def test_memory_returns_when_the_last_plan_is_released(device):
    def run_and_release():
        runners = [runner_of(layered(3), device) for _ in range(2)]
        for runner in runners:
            warm(runner, 2048, torch.zeros(1, device="cuda"), *parameters(3), randn(2048, 64))
        for runner in runners:
            runner.release()

    def reserved():
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    run_and_release()
    before = reserved()
    run_and_release()
    assert reserved() <= before


def test_workspaces_outlive_the_plan_that_used_them_first(device):
    program = layered(2, Capture.ALWAYS)
    first, second = (runner_of(program, device) for _ in range(2))
    args = [32, torch.zeros(1, device="cuda"), *parameters(2)]
    for runner in (first, second):
        warm(runner, *args, randn(32, 64))
    first.release()
    gc.collect()
    torch.cuda.empty_cache()
    rubbish = [torch.full((2**22,), float("nan"), device="cuda") for _ in range(8)]
    for _ in range(3):
        x = randn(32, 64)
        torch.testing.assert_close(second(*args, x)[0], program.run(*args, x)[0])
    assert second.stats.replays == 3
    del rubbish


def test_garbage_collection_is_on_again_after_a_capture(device):
    assert gc.isenabled()
    runner = runner_of(layered(1), device)
    warm(runner, 5, torch.zeros(1, device="cuda"), *parameters(1), randn(5, 64))
    assert gc.isenabled()
