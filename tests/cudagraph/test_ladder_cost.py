"""What the rungs of a ladder cost the host, counted: whatever does not depend on a size is done for the first rung."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from graphcap.cudagraph import (
    Capture,
    GraphDevice,
    GraphRunner,
    InputKind,
    InputSpec,
    Program,
    device_for,
    step,
)
from graphcap.cudagraph.checks.worth import Worth
from graphcap.cudagraph.dispatch.phase import Phase, in_phase
from graphcap.cudagraph.dispatch.step import current_step
from graphcap.cudagraph.hardware.simulated import SimulatedDevice
from graphcap.cudagraph.hardware.simulated_recording import SimulatedRecording, SimulatedSegment
from graphcap.cudagraph.recording import in_place, knowledge, layout
from graphcap.cudagraph.replaying import replay as replays
from graphcap.cudagraph.replaying.plan import Plan
from tests.cudagraph.padded_regions import LIVE, N, PaddedRegion
from tests.cudagraph.regions import runner_of

NUM_LAYERS, WIDTH = 6, 4
SIZES = [12, 8, 6, 4, 2]
NUM_WARMUPS = 2


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the device and the work that belongs to a family are asked for."""
    counts: Counter[str] = Counter()

    def count(holder: Any, name: str, label: str) -> None:
        plain = getattr(holder, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            counts[label] += 1
            return plain(*args, **kwargs)

        monkeypatch.setattr(holder, name, counting)

    for name in ("begin", "usage", "enter", "wait", "allocate", "trim", "spare_bytes"):
        count(SimulatedDevice, name, name)
    count(SimulatedRecording, "end", "end")
    count(SimulatedSegment, "replay", "replay")
    count(knowledge, "observe", "calls watched")
    count(layout, "lay_out", "layouts")
    count(in_place, "weak_view", "inputs viewed")
    replays._compiled.cache_clear()
    return counts


def plans_of(runner: GraphRunner) -> list[Plan]:
    return list(runner._table.plans.values())


def write_twice(x: Tensor, out: Tensor) -> tuple[()]:
    out.copy_(x * 2)
    return ()


def write_one_more(seen: Tensor) -> tuple[()]:
    seen.add_(1)
    return ()


def decoder() -> Program:
    """Layers of a captured step with a weight and a live step that writes into what the former made."""
    region = PaddedRegion()
    x = region.rows("x", WIDTH)
    weights = [region._input(InputSpec(f"w{each}", InputKind.STATIC, sizes=(WIDTH,))) for each in range(NUM_LAYERS)]
    for weight in weights:
        x, out = region.step(lambda x, w: (x + w, torch.zeros_like(x)), x, weight, writes=2)
        region.step(write_twice, x, out, writes=0, mutates=[out], capture=LIVE)
        x = out
    return region.program(region.step(lambda x: x + 1, x), sizes=[(N, WIDTH)])


class Ladder:
    """Captures rungs as ``graphcap.capture`` does."""

    def __init__(self, program: Program | None = None, device: GraphDevice | None = None) -> None:
        self.program = program or decoder()
        self.place = torch.device("cpu") if device is None else device.device
        self.weights = [torch.randn(WIDTH, device=self.place) for _ in range(NUM_LAYERS)]
        self.runner = runner_of(self.program, device, capture_sizes=[*SIZES, 1], max_graph_bytes=2**30)

    def call(self, size: int, phase: Phase) -> None:
        args = size, torch.randn(size, WIDTH, device=self.place), *self.weights
        with in_phase(phase):
            (got,) = self.runner(*args)
        torch.testing.assert_close(got, self.program.run(*args)[0], rtol=0, atol=0)

    def capture(self, size: int) -> None:
        for _ in range(NUM_WARMUPS):
            self.call(size, Phase.WARM_UP)
        self.call(size, Phase.RECORD)
        assert self.runner.stats.plans[-1].key == (size,)


def test_what_each_rung_asks_of_the_device(counted: Counter[str]) -> None:
    ladder = Ladder()
    segments = NUM_LAYERS + 1
    for number, size in enumerate(SIZES):
        counted.clear()
        ladder.capture(size)
        assert ladder.runner.stats.plans[-1].num_segments == segments
        asked = {name: counted[name] for name in ("begin", "end", "replay", "usage", "enter", "wait", "trim")}
        assert asked == {
            "begin": segments, "end": segments, "replay": segments, "usage": 2, "enter": 1, "wait": 0, "trim": 0,
        }  # fmt: skip
        assert counted["allocate"] <= (1 if number == 0 else 0), "smaller rungs lie in the memory of the first"
        assert counted["spare_bytes"] == 0


def test_what_does_not_depend_on_a_size_is_done_once(counted: Counter[str]) -> None:
    ladder = Ladder()
    ladder.capture(SIZES[0])
    assert counted["calls watched"] == 1, "of the two warm-ups"
    assert counted["layouts"] == 1
    assert counted["inputs viewed"] == NUM_LAYERS
    assert replays._compiled.cache_info().misses == 1
    counted.clear()
    for size in SIZES[1:]:
        ladder.capture(size)
    assert counted["calls watched"] == counted["layouts"] == counted["inputs viewed"] == 0
    assert replays._compiled.cache_info().misses == 1
    layouts = {id(plan.recorded.layout) for plan in plans_of(ladder.runner)}
    assert len(layouts) == 1


def test_size_one_is_watched_itself(counted: Counter[str]) -> None:
    ladder = Ladder()
    for size, watched in ((2, 1), (1, 2)):
        ladder.capture(size)
        assert counted["calls watched"] == watched


def test_every_warm_up_runs_the_model(counted: Counter[str]) -> None:
    runs = []
    plain = decoder()

    def running(*args: Any) -> tuple[Any, ...]:
        runs.append(args[0])
        return plain.run(*args)

    ladder = Ladder(replace(plain, run=running))
    ladder.capture(SIZES[0])
    runs.clear()
    for _ in range(3):
        args = SIZES[1], torch.randn(SIZES[1], WIDTH), *ladder.weights
        with in_phase(Phase.WARM_UP):
            ladder.runner(*args)
    assert runs == [SIZES[1]] * 3
    with in_phase(Phase.RECORD):
        ladder.runner(*args)
    assert runs == [SIZES[1]] * 3, "a capture runs the steps itself"


def test_a_weight_that_has_moved_is_viewed_anew(counted: Counter[str]) -> None:
    ladder = Ladder()
    ladder.capture(SIZES[0])
    ladder.weights[2] = torch.randn(WIDTH)
    counted.clear()
    ladder.capture(SIZES[1])
    assert counted["inputs viewed"] == 1
    ladder.weights[2].fill_(3.0)
    ladder.call(SIZES[1], Phase.TRAFFIC)


def unlike_at(special: int, capture: Capture) -> Program:
    """A step that returns a view of what it reads, but for one size a copy: so does ``reshape`` for some strides."""

    def maybe_view(x: Tensor) -> Tensor:
        return x.clone() if x.shape[0] == special else x[:]

    region = PaddedRegion()
    x = region.rows("x", WIDTH)
    made = region.step(lambda x: x + 1, x)
    seen = region.step(maybe_view, made, capture=capture)
    region.step(write_one_more, seen, writes=0, mutates=[seen])
    return region.program(made, seen, sizes=[(N, WIDTH), (N, WIDTH)])


@pytest.mark.parametrize("capture", [Capture.ALWAYS, LIVE])
def test_a_size_that_shares_memory_in_another_way_is_watched_itself(counted: Counter[str], capture: Capture) -> None:
    program = unlike_at(4, capture)
    runner = runner_of(program, capture_sizes=[8, 4, 2])

    def called(size: int, phase: Phase) -> None:
        args = size, torch.randn(size, WIDTH)
        with in_phase(phase):
            got = runner(*args)
        for mine, true in zip(got, program.run(*args), strict=True):
            torch.testing.assert_close(mine, true, rtol=0, atol=0)

    for size, watched, recordings in ((8, 1, 1), (4, 2, 3), (2, 2, 1)):
        for phase in (Phase.WARM_UP, *[Phase.RECORD] * recordings):
            called(size, phase)
        assert counted["calls watched"] == watched
        assert runner.stats.plans[-1].key == (size,), "no step is blamed for it"
    assert not runner.stats.failures
    for size in (8, 4, 2, 4, 8):
        called(size, Phase.TRAFFIC)
    assert runner.stats.replays == 5


@pytest.mark.parametrize("capture", [Capture.ALWAYS, LIVE])
def test_a_size_at_which_a_step_looks_for_other_inputs_is_watched_itself(
    counted: Counter[str], capture: Capture
) -> None:
    def look(x: Tensor) -> Tensor:
        inputs = current_step().inputs
        return x + inputs["scale"] * (inputs["shift"] if x.shape[0] == 4 else 1)

    region = PaddedRegion()
    x = region.rows("x", WIDTH)
    program = region.program(
        region.step(look, x, capture=capture), region.step(lambda x: x + 1, x), sizes=[(N, WIDTH)] * 2
    )
    runner = runner_of(program, capture_sizes=[8, 4, 2])
    given = {"scale": torch.ones(WIDTH), "shift": torch.ones(WIDTH)}
    for size, watched, recordings in ((8, 1, 1), (4, 2, 3), (2, 2, 1)):
        for phase in (Phase.WARM_UP, *[Phase.RECORD] * recordings):
            with step(num_tokens=size, inputs=given), in_phase(phase):
                runner(size, torch.randn(size, WIDTH))
        assert counted["calls watched"] == watched
        assert runner.stats.plans[-1].key == (size,)
    asked = {plan.stats.key: plan.recorded.seen.asked | plan.recorded.seen.asked_live for plan in plans_of(runner)}
    assert asked == {(8,): {"scale"}, (4,): {"scale", "shift"}, (2,): {"scale"}}


def test_steps_that_bring_other_inputs_are_another_family(counted: Counter[str]) -> None:
    program = decoder()
    runner = runner_of(program, capture_sizes=SIZES)
    weights = [torch.randn(WIDTH) for _ in range(NUM_LAYERS)]
    for size, names, watched in ((8, (), 1), (4, ("a",), 2), (2, ("a",), 2), (12, (), 2)):
        with step(num_tokens=size, inputs={name: torch.ones(1) for name in names}), in_phase(Phase.WARM_UP):
            runner(size, torch.randn(size, WIDTH), *weights)
        assert counted["calls watched"] == watched


class Cached:
    """Layers with a captured step and live ones that add rows to a cache and write into what the captured one made."""

    def __init__(self, device: GraphDevice | None = None, result: bool = False) -> None:
        self.place = torch.device("cpu") if device is None else device.device
        self.runs: Counter[int] = Counter()
        region = PaddedRegion()
        x = region.rows("x", WIDTH)
        caches = [region.state(f"cache{each}", 16, WIDTH, kind=InputKind.STATIC) for each in range(NUM_LAYERS)]
        for cache in caches:
            x, out = region.step(lambda x: (x + 1, torch.empty_like(x).fill_(torch.nan)), x, writes=2)
            region.step(self._attend, x, out, cache, writes=0, mutates=[out, cache], capture=LIVE)
            if result:
                x = region.step(lambda x: x.clone(), x, capture=LIVE)
            x = region.step(lambda x, out: x + out, x, out)
        self.program = region.program(x, sizes=[(N, WIDTH)])
        self.caches = [torch.zeros(16, WIDTH, device=self.place) for _ in caches]
        self.runner = runner_of(self.program, device, capture_sizes=SIZES, max_graph_bytes=2**30)

    def _attend(self, x: Tensor, out: Tensor, cache: Tensor) -> tuple[()]:
        self.runs[x.shape[0]] += 1
        cache[: x.shape[0]] += x
        out.copy_(cache[: x.shape[0]] * 2)
        return ()

    def call(self, size: int, purpose: in_phase) -> tuple[Tensor, Tensor]:
        """What came of a call, and what should have."""
        x = torch.randn(size, WIDTH, device=self.place)
        expected = self.program.run(size, x, *(cache.clone() for cache in self.caches))[0]
        self.runs.clear()
        with purpose:
            return self.runner(size, x, *self.caches)[0], expected

    def capture(self, size: int, num_warmups: int = 1) -> Tensor:
        for _ in range(num_warmups):
            self.call(size, in_phase(Phase.WARM_UP))
        got, _ = self.call(size, in_phase(Phase.RECORD, is_unread=True))
        assert self.runner.stats.plans[-1].key == (size,)
        return got

    def serves(self, *sizes: int) -> bool:
        replays = self.runner.stats.replays
        for size in sizes:
            got, expected = self.call(size, in_phase(Phase.TRAFFIC))
            torch.testing.assert_close(got, expected, rtol=0, atol=0)
            assert self.runs == {size: NUM_LAYERS}
        return self.runner.stats.replays == replays + len(sizes)


def test_a_recording_that_nobody_reads_does_without_live_steps_that_only_write() -> None:
    cached = Cached()
    cached.capture(SIZES[0])
    assert cached.runs == {SIZES[0]: NUM_LAYERS}, "the first size of a family runs whole"
    for size in SIZES[1:]:
        before = [cache.clone() for cache in cached.caches]
        got = cached.capture(size)
        assert not cached.runs
        assert bool(got.isfinite().all()), "what they would have written is not left to chance"
        changed = [bool((cache != old).any()) for cache, old in zip(cached.caches, before, strict=True)]
        assert changed == [True] * NUM_LAYERS, "by the warm-up"
    assert cached.serves(*SIZES, *reversed(SIZES))


def test_state_stays_as_it_is_where_live_steps_do_not_run() -> None:
    cached = Cached()
    for size in SIZES[:2]:
        cached.capture(size)
    cached.call(SIZES[2], in_phase(Phase.WARM_UP))
    before = [cache.clone() for cache in cached.caches]
    cached.call(SIZES[2], in_phase(Phase.RECORD, is_unread=True))
    assert all(torch.equal(cache, old) for cache, old in zip(cached.caches, before, strict=True))


def test_a_recording_whose_result_is_read_runs_whole() -> None:
    cached = Cached()
    cached.capture(SIZES[0])
    cached.call(SIZES[1], in_phase(Phase.WARM_UP))
    got, expected = cached.call(SIZES[1], in_phase(Phase.RECORD))
    assert cached.runs == {SIZES[1]: NUM_LAYERS}
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("result", "num_warmups"), [(True, 1), (False, 0)])
def test_live_steps_run_where_others_have_results_and_where_their_libraries_know_no_such_size(
    result: bool, num_warmups: int
) -> None:
    cached = Cached(result=result)
    cached.runner = runner_of(cached.program, capture_sizes=SIZES, max_graph_bytes=2**30, num_warmups=num_warmups)
    cached.capture(SIZES[0])
    cached.capture(SIZES[1], num_warmups)
    assert cached.runs == {SIZES[1]: NUM_LAYERS}
    assert cached.serves(*SIZES[:2])


@pytest.mark.gpu
def test_what_is_recorded_without_live_steps_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Worth, "scales", lambda *_: None)
    device, reason = device_for({torch.device("cuda", 0)}, simulate=False, private=True)
    assert device is not None, reason
    cached = Cached(device)
    for size in SIZES:
        cached.capture(size)
        assert bool(cached.runs) == (size == SIZES[0])
    assert cached.serves(*SIZES, *reversed(SIZES))


@pytest.mark.gpu
def test_what_each_rung_asks_of_a_gpu(counted: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    looks: Counter[str] = Counter()

    def count(name: str) -> None:
        plain = getattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, lambda *args: looks.update([name]) or plain(*args))

    monkeypatch.setattr(Worth, "scales", lambda *_: None)  # segments as small as these do not pay
    device, reason = device_for({torch.device("cuda", 0)}, simulate=False, private=True)
    assert device is not None, reason
    ladder = Ladder(device=device)
    for name in ("memory_snapshot", "mem_get_info"):
        count(name)
    ladder.capture(SIZES[0])
    for size in (*SIZES[1:], 1):
        looks.clear()
        ladder.capture(size)
        assert looks["memory_snapshot"] <= 1
        assert looks["mem_get_info"] <= 2
    assert counted["calls watched"] == 2, "for the largest, and for size 1"
    ladder.call(3, Phase.TRAFFIC)  # proves padding
    for size in (12, 11, 8, 7, 3, 2, 1):
        ladder.call(size, Phase.TRAFFIC)
    assert ladder.runner.stats.replays >= 6, ladder.runner.stats
