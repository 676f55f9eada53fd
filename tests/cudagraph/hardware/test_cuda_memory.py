"""Memory of real CUDA graphs: what plans hold, a full device, pools of the user, and that everything comes back."""

from __future__ import annotations

import contextlib
import gc
import warnings

import pytest
import torch

from graphcap.cudagraph import device_for
from graphcap.cudagraph.hardware.choose import set_graph_pool
from graphcap.cudagraph.hardware.memory import memory
from tests.cudagraph.regions import LIVE, Region, runner_of, warm

pytestmark = pytest.mark.gpu

MIB = 2**20


@pytest.fixture
def device():
    found, reason = device_for({torch.device("cuda", 0)}, simulate=False)
    assert found is not None, reason
    # Libraries and the driver allocate at the first capture of a process; that is not what these tests are about.
    first = runner_of(chain(2), found)
    warm(first, 8, torch.ones(8, 64, device="cuda"))
    first.release()
    reserved()
    return found


def chain(num_steps, attention=LIVE):
    """``[n, width]``: captured steps, a live one between any two."""
    region = Region()
    n, x = region.size("n"), region.tensor("x")
    for _ in range(num_steps):
        x = region.step(lambda n, x: torch.relu(x) + n, n, x)
        x = region.step(lambda x: x * 0.5, x, capture=attention)
    return region.returning(x)


def reserved() -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def check(program, runner, n, x) -> None:
    assert torch.equal(runner(n, x)[0], program.run(n, x)[0])


@contextlib.contextmanager
def room_for(nbytes):
    """The process may take so many more bytes than it has reserved now."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((reserved() + nbytes) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_exclusive_and_shared_bytes_add_up(device):
    program = chain(60)
    runner = runner_of(program, device, max_copy_bytes=2**30)
    x = torch.randn(1024, 1024, device="cuda")  # 4 MiB
    for n in range(30):
        for _ in range(3):
            check(program, runner, n, x)
    plans = runner.stats.plans
    assert len(plans) == 30
    assert all(plan.bytes == plan.exclusive_bytes + plan.shared_bytes for plan in plans)
    assert plans[0].shared_bytes >= 2 * 4 * MIB, "the pool and the copied input"
    assert plans[-1].shared_bytes <= 2 * MIB, "later plans use the memory of the first"
    assert sum(plan.exclusive_bytes for plan in plans) > 0, "executable graphs take memory"
    account = memory()[device.name]
    assert account.num_plans == 30
    assert account.exclusive_bytes == sum(plan.exclusive_bytes for plan in plans)
    assert account.shared_bytes >= plans[0].shared_bytes
    assert account.ceiling_bytes >= torch.cuda.get_device_properties(0).total_memory // 10
    runner.release()
    assert memory()[device.name].exclusive_bytes == 0


def test_bytes_of_a_pool_are_what_the_allocator_says(device, monkeypatch):
    looks = []
    snapshot = torch.cuda.memory_snapshot
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda *args: looks.append(args) or snapshot(*args))
    runner = runner_of(chain(2), device, max_copy_bytes=2**30)
    for n in range(4):
        x = torch.randn(256 << n, 1024, device="cuda")
        for _ in range(3):
            check(runner.program, runner, n, x)
        assert len(looks) <= 2 * (n + 1), "once a plan; the first may have found an older pool"
        pool = next(iter(runner._table.plans.values())).recorded.pool
        assert pool.nbytes() == sum(segment["total_size"] for segment in snapshot(pool.handle))


def test_no_graph_is_kept_beyond_the_budget(device):
    before = reserved()
    program = chain(2)
    runner = runner_of(program, device, max_graph_bytes=0)
    x = torch.randn(1024, 1024, device="cuda")
    for _ in range(40):
        check(program, runner, 1, x)
    assert runner.stats.plans == []
    del x
    assert reserved() <= before, "what the attempt took has gone back"


@pytest.mark.parametrize("extra", [0, 40 * MIB, 80 * MIB])
def test_full_device_leaves_a_working_model_and_other_plans(device, extra):
    """Field notes row 5, on a GPU.

    A capture needs the copied input, the result in the pool and its copy; a live call only the result."""
    small_program = chain(2)
    small = runner_of(small_program, device)
    little = torch.randn(8, 64, device="cuda")
    warm(small, 3, little)
    pool = device._pool()
    region = Region()
    n, x = region.size("n"), region.tensor("x")
    program = region.returning(region.step(lambda n, x: x + n, n, x))
    runner = runner_of(program, device, max_copy_bytes=2**30)
    x = torch.randn(8 * MIB, device="cuda")  # 32 MiB
    with room_for(70 * MIB + extra), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(30):
            result = runner(1, x)[0]
            assert torch.equal(result[::4096], x[::4096] + 1)
            del result
            check(small_program, small, 3, little)
    if not runner.stats.plans:
        assert 1 <= len(runner.stats.failures) <= 2, "one more try, no storm"
    assert device._pool() is pool, "torch ended the captures itself, so the pool is as good as before"
    runner.release()
    for _ in range(3):
        check(program, runner, 1, x)
    assert len(runner.stats.plans) == 1, "with memory it is captured"
    replays = small.stats.replays
    check(small_program, small, 3, little)
    assert small.stats.replays == replays + 1


def test_generators_and_allocator_are_sound_after_a_full_device(device):
    region = Region()
    x = region.tensor("x")
    y = region.step(lambda x: x + torch.rand_like(x), x)
    runner = runner_of(region.returning(y), device, max_copy_bytes=2**30)
    x = torch.zeros(8 * MIB, device="cuda")
    with room_for(70 * MIB), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(4):
            runner(x)
    torch.manual_seed(7)
    first = torch.rand(4, device="cuda")
    torch.manual_seed(7)
    assert torch.equal(torch.rand(4, device="cuda"), first)
    held = [torch.empty(2 * MIB, device="cuda") for _ in range(4)]
    del held
    reserved()
    runner.release()
    runner(x)
    assert len(runner.stats.plans) == 1


@pytest.mark.parametrize("end", ["release", "delete"])
def test_everything_comes_back_with_the_last_plan(device, end):
    def one_life():
        program = chain(3)
        runner = runner_of(program, device)
        for n in (1, 2):
            for _ in range(4):
                check(program, runner, n, torch.randn(512, 1024, device="cuda"))
        assert memory()[device.name].num_plans == 2
        if end == "release":
            runner.release()
        del runner

    one_life()
    before, accounted = reserved(), memory()[device.name]
    one_life()
    assert reserved() <= before
    assert memory()[device.name] == accounted


def test_plan_is_dropped_after_its_last_replay(device):
    """The replay is still waiting behind a long kernel when the plan is given up."""
    program = chain(2)
    runner = runner_of(program, device)
    x = torch.randn(512, 1024, device="cuda")
    warm(runner, 1, x)
    expected = program.run(1, x)[0]
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)
    got = runner(1, x)[0]
    runner.release()
    torch.cuda.empty_cache()
    rubbish = [torch.full((512, 1024), float("nan"), device="cuda") for _ in range(16)]
    assert torch.equal(got, expected)
    del rubbish


def test_graphs_allocate_from_the_pool_of_the_user(device):
    pool = torch.cuda.MemPool()
    set_graph_pool(pool, 0)
    try:
        program = chain(3)
        runner = runner_of(program, device)
        x = torch.randn(1024, 1024, device="cuda")
        for _ in range(6):
            check(program, runner, 2, x)
        assert runner.stats.replays == 3
        taken = sum(segment["total_size"] for segment in torch.cuda.memory_snapshot(pool.id))
        assert taken >= 4 * MIB
        runner.release()
    finally:
        set_graph_pool(None, 0)
    for _ in range(3):
        check(program, runner, 2, x)
    assert device._pool().handle != pool.id
    del pool
    for _ in range(3):
        check(program, runner, 2, x)


def test_workspaces_outlive_the_plan_that_was_captured_first(device):
    """Two plans with matrix products; the first goes, its memory is written over, the second must not notice."""
    region = Region()
    x, w, b = region.tensor("x"), region.static("w"), region.static("b")
    y = region.step(torch.nn.functional.linear, x, w, b)
    z = region.step(torch.mm, y, w)
    program = region.returning(region.step(lambda z: torch.softmax(z @ z.t(), -1) @ z, z))
    for dtype in (torch.float32, torch.bfloat16):
        first, second = (runner_of(program, device) for _ in range(2))
        w, b = (torch.randn(*size, device="cuda", dtype=dtype) / 32 for size in ((1024, 1024), (1024,)))
        for runner in (first, second):
            warm(runner, torch.randn(128, 1024, device="cuda", dtype=dtype), w, b)
        first.release()
        del first
        reserved()
        rubbish = [torch.full((4 * MIB,), float("nan"), device="cuda") for _ in range(16)]
        for _ in range(3):
            x = torch.randn(128, 1024, device="cuda", dtype=dtype)
            torch.testing.assert_close(second(x, w, b)[0], program.run(x, w, b)[0])
        assert second.stats.replays == 3
        del rubbish, second


def narrow_products():
    """``[rows, 4096]`` times a weight of few rows: split along the sum, with partial sums in the workspace."""
    region = Region()
    x, w, b = region.tensor("x"), region.static("w"), region.static("b")
    y = region.step(torch.nn.functional.linear, x, w)
    return region.returning(region.step(lambda y, x, w, b: y + torch.nn.functional.linear(x, w, b), y, x, w, b))


def narrow_parameters():
    return torch.randn(256, 4096, device="cuda").bfloat16() / 64, torch.randn(256, device="cuda").bfloat16()


def test_workspaces_that_others_clear_stay_ours(device):
    """``mode="reduce-overhead"`` clears torch's table of workspaces for every graph that it records. Neither may a
    replay write its partial sums into somebody's tensor then, nor find rubbish among them.
    """
    program, (w, b) = narrow_products(), narrow_parameters()
    runner = runner_of(program, device)
    warm(runner, torch.randn(8, 4096, device="cuda").bfloat16(), w, b)
    for recapture in (False, True):
        torch._C._cuda_clearCublasWorkspaces()
        if recapture:
            runner.release()
            warm(runner, torch.randn(8, 4096, device="cuda").bfloat16(), w, b)
            torch._C._cuda_clearCublasWorkspaces()
        with torch.cuda.stream(device._stream):  # whose free memory it would be
            others = [torch.full((MIB,), 3.0, device="cuda") for _ in range(256)]
        torch.cuda.synchronize()
        before = runner.stats.replays
        for _ in range(3):
            x = torch.randn(8, 4096, device="cuda").bfloat16()
            y = x.double() @ w.double().t()
            torch.testing.assert_close(runner(x, w, b)[0].double(), 2 * y + b, rtol=0.05, atol=0.05)
        assert runner.stats.replays == before + 3
        torch.cuda.synchronize()
        assert all(bool((each == 3.0).all()) for each in others)
        del others


def test_reduce_overhead_beside_our_graphs(device):
    """Torch's own graphs are recorded between replays of ours."""
    program, (w, b) = narrow_products(), narrow_parameters()
    runner = runner_of(program, device)
    warm(runner, torch.randn(8, 4096, device="cuda").bfloat16(), w, b)
    theirs = torch.compile(lambda x: torch.nn.functional.linear(x, w, b).relu(), mode="reduce-overhead", dynamic=False)
    kept = []
    with torch.no_grad():
        for n in (8, 16, 24):
            for _ in range(3):
                x = torch.randn(n, 4096, device="cuda").bfloat16()
                kept.append((theirs(x).clone(), torch.nn.functional.linear(x, w, b).relu()))
                x = torch.randn(8, 4096, device="cuda").bfloat16()
                kept.append((runner(x, w, b)[0].clone(), program.run(x, w, b)[0]))
    for got, expected in kept:
        torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)
