"""What two ranks go through together. Each function runs on both, in step."""

from __future__ import annotations

import dataclasses
import random
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import graphcap
from graphcap.config import CUDAGraphMode
from graphcap.cudagraph import Capture, Dispatch, GraphKey, GraphRunner, Program, step
from graphcap.cudagraph.agreement import agreement_of
from graphcap.cudagraph.hardware.account import RECENT_USES
from graphcap.cudagraph.hardware.simulated import SimulatedDevice
from graphcap.errors import RankError
from tests.cudagraph.padded_regions import N, PaddedRegion
from tests.cudagraph.regions import LIVE, Region, runner_of
from tests.distributed.two_ranks import Rank

WIDTH = 4
BRIDGES = 2**20  #: bytes that the results of live steps have together


class OwnTensor(Tensor):
    """No graph takes one as an input."""


def layered(rank: Rank, fails_in: int = -1, collective: Capture = LIVE) -> Program:
    """``[n, 4]`` through three layers with a sum over the ranks after each of the first two.

    Args:
        rank: whose.
        fails_in: the layer that cannot be captured on rank 1.
        collective: how the sums run.
    """
    region = Region()
    region.size("n")
    x = region.tensor("x")

    def layer(number: int) -> Any:
        def compute(x: Tensor) -> Tensor:
            if number == fails_in and rank.rank == 1:
                x.sum().item()
            return x / 2 + number

        return compute

    for number in range(2):
        x = region.step(rank.all_reduce, region.step(layer(number), x), capture=collective)
    return region.returning(region.step(layer(2), x))


def truth(inputs: list[Tensor]) -> Tensor:
    """What ``layered`` returns where the ranks call with these."""
    total = sum(x / 2 for x in inputs)
    return (total / 2 + 1) * 2 / 2 + 2


def same_inputs(n: int, seed: int) -> list[Tensor]:
    """The inputs of both ranks, known to each of them."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, WIDTH, generator=generator) for _ in range(2)]


def call(runner: GraphRunner, rank: Rank, n: int, seed: int) -> bool:
    """Whether one call gives what it should."""
    inputs = same_inputs(n, seed)
    (result,) = runner(n, inputs[rank.rank])
    return torch.allclose(result, truth(inputs))


def report(runner: GraphRunner, rank: Rank, right: list[bool]) -> dict[str, Any]:
    stats = runner.stats
    return {
        "right": all(right),
        "sums": rank.sums,
        "plans": [(plan.key, plan.captured) for plan in stats.plans],
        "replays": stats.replays,
        "failures": list(stats.failures),
        "reasons": dict(stats.live_calls),
        "evictions": stats.evictions,
        "recaptures": stats.recaptures,
    }


def same_plans(rank: Rank, **settings: Any) -> dict[str, Any]:
    runner = runner_of(layered(rank), process_group=rank.group, **settings)
    right = [call(runner, rank, n, seed) for seed, n in enumerate([3, 3, 3, 3, 5, 5, 3, 5, 5, 3])]
    return report(runner, rank, right)


def collectives_in_graphs(rank: Rank) -> dict[str, Any]:
    runner = runner_of(layered(rank, collective=Capture.ALWAYS), process_group=rank.group)
    right = [call(runner, rank, 3, seed) for seed in range(6)]
    return report(runner, rank, right)


def _failure(rank: Rank, layer: int) -> dict[str, Any]:
    runner = runner_of(layered(rank, fails_in=layer), process_group=rank.group)
    right = [call(runner, rank, 3, seed) for seed in range(8)]
    return report(runner, rank, right)


def failure_in_the_first_segment(rank: Rank) -> dict[str, Any]:
    return _failure(rank, 0)


def failure_in_the_middle(rank: Rank) -> dict[str, Any]:
    return _failure(rank, 1)


def failure_in_the_last_segment(rank: Rank) -> dict[str, Any]:
    return _failure(rank, 2)


class WatchedDevice(SimulatedDevice):
    """Says of each sum over the ranks whether it ran in a graph, live, or was recorded."""

    def __init__(self, rank: Rank) -> None:
        super().__init__()
        self.now, self.ways = "live", list[str]()
        self._rank = rank

    def all_reduce(self, x: Tensor) -> Tensor:
        self.ways.append(self.now)
        return self._rank.all_reduce(x)

    def begin(self, pool: Any, released: Any) -> Any:
        recording = super().begin(pool, released)
        self.now, end, abort = "recorded", recording.end, recording.abort

        def watched_end() -> Any:
            self.now = "live"
            segment = end()
            replay = segment.replay

            def watched_replay() -> None:
                self.now = "graph"
                replay()
                self.now = "live"

            segment.replay = watched_replay
            return segment

        def watched_abort() -> None:
            self.now = "live"
            abort()

        recording.end, recording.abort = watched_end, watched_abort
        return recording


def sums_before_a_failure(rank: Rank) -> dict[str, Any]:
    """Two segments with a sum each; rank 1 fails in the second, when its sum has been recorded."""
    device, region = WatchedDevice(rank), Region()
    x = region.tensor("x")

    def fails_on_one(x: Tensor) -> Tensor:
        if rank.rank == 1:
            x.sum().item()
        return x + 1

    h = region.step(lambda h: h * 2, region.step(device.all_reduce, x), capture=LIVE)
    y = region.step(fails_on_one, region.step(device.all_reduce, h))
    runner = runner_of(region.returning(y), device, process_group=rank.group)
    right, ways = [], []
    for seed in range(5):
        inputs = same_inputs(3, seed)
        (result,) = runner(inputs[rank.rank])
        right.append(torch.allclose(result, sum(inputs) * 4 + 1))  # type: ignore[arg-type]
        ways.append(device.ways[:])
        device.ways.clear()
    return report(runner, rank, right) | {"ways": ways}


def no_room_on_one_rank(rank: Rank) -> dict[str, Any]:
    limit = 2**24 if rank.rank == 0 else 1
    runner = runner_of(layered(rank), process_group=rank.group, max_graph_bytes=limit)
    right = [call(runner, rank, 3, seed) for seed in range(9)]
    return report(runner, rank, right)


def out_of_memory_on_one_rank(rank: Rank) -> dict[str, Any]:
    device = SimulatedDevice(capacity=None if rank.rank == 0 else 600)  # room for the copied input, not for more
    runner = runner_of(layered(rank), device, process_group=rank.group)
    right = [call(runner, rank, 30, seed) for seed in range(12)]
    return report(runner, rank, right)


def eviction_on_one_rank(rank: Rank) -> dict[str, Any]:
    """Rank 1 has room for two plans, rank 0 for any number."""
    device = SimulatedDevice()
    limit = 2**24
    sizes = [16, 16, 16, 24, 24, 24]
    runner = runner_of(layered(rank), device, process_group=rank.group, max_graph_bytes=limit)
    right = [call(runner, rank, n, seed) for seed, n in enumerate(sizes)]
    if rank.rank == 1:
        runner._maker.capture.room._limit = device.account.exclusive_bytes() + device.account.shared_bytes() + 700
    right += [call(runner, rank, 24, seed) for seed in range(RECENT_USES + 2)]  # 16 was used long ago
    right += [call(runner, rank, 20, seed) for seed in range(5)]
    right += [call(runner, rank, n, seed) for seed, n in enumerate([16, 24, 20])]
    return report(runner, rank, right)


def misfortunes(rank: Rank) -> list[dict[str, Any]]:
    """Random traffic, while each rank has its own limits and its own layer that cannot be captured."""
    found = []
    for seed in range(6):
        common, own = random.Random(seed), random.Random(100 * seed + rank.rank)
        device = SimulatedDevice(capacity=own.choice([None, None, None, BRIDGES + 3000]))
        program = layered(rank, fails_in=own.choice([-1, 0, 1, 2]), collective=LIVE)
        limit = own.choice([None, BRIDGES + 2000, BRIDGES + 2800, BRIDGES + 3600])
        runner = runner_of(program, device, process_group=rank.group, max_graph_bytes=limit)
        sizes = [common.choice([4, 8, 12, 16, 20]) for _ in range(40)] + [4] * RECENT_USES
        sizes += [common.choice([8, 12, 24]) for _ in range(20)]
        rank.sums = []
        with warnings.catch_warnings(action="ignore"):
            right = [call(runner, rank, n, call_seed) for call_seed, n in enumerate(sizes)]
        found.append(report(runner, rank, right))
    return found


def live_on_one_rank(rank: Rank) -> dict[str, Any]:
    """Rank 1 brings an input that no graph takes."""
    region = Region()
    x, y = region.tensor("x"), region.tensor("y")
    doubled = region.step(lambda y: y.as_subclass(Tensor) * 2, y)
    total = region.step(rank.all_reduce, region.step(lambda x: x + 1, x), capture=LIVE)
    runner = runner_of(region.returning(region.step(lambda t, d: t + d, total, doubled)), process_group=rank.group)
    right = []
    for seed in range(6):
        inputs, (y, _) = same_inputs(3, seed), same_inputs(3, seed + 100)
        (result,) = runner(inputs[rank.rank], y if rank.rank == 0 else y.as_subclass(OwnTensor))
        right.append(torch.allclose(result, inputs[0] + inputs[1] + 2 + y * 2))
    return report(runner, rank, right)


def padded(rank: Rank, mixes_rows: bool = False, needs_state: bool = False) -> Program:
    """Rows ``[n, 4]``; a collective whose size does not follow n counts the calls."""
    region = PaddedRegion()
    x = region.rows("x", WIDTH)

    def counted(x: Tensor) -> Tensor:
        rank.all_reduce(torch.ones(1))
        return x + 1

    h = region.step(counted, region.step(lambda x: x * 2, x), capture=LIVE)
    mix = mixes_rows and rank.rank == 1
    out = region.step(lambda h: h - h.mean(0) * (1 if mix else 0), h)
    return region.program(out, sizes=[(N, WIDTH)])


def padded_call(runner: GraphRunner, rank: Rank, sizes: tuple[int, int], seed: int, mixes: bool = False) -> bool:
    """One call at a size of its own for each rank, with the larger of their decisions."""
    n = sizes[rank.rank]
    x = same_inputs(n, seed)[0]
    with step(dispatch=_largest(rank, runner.outlook.dispatch(GraphKey(n), None))):
        (result,) = runner(n, x)
    expected = x * 2 + 1
    return torch.allclose(result, expected - expected.mean(0) if mixes and rank.rank == 1 else expected, atol=1e-5)


def _largest(rank: Rank, mine: Dispatch) -> Dispatch:
    """The decision that all ranks can follow: the least mode, the most tokens."""
    both: list[Any] = [None, None]
    dist.all_gather_object(both, (mine.mode.name, mine.num_tokens), group=rank.traffic)
    mode = min((CUDAGraphMode[mode] for mode, _ in both), key=list(CUDAGraphMode).index)
    return dataclasses.replace(mine, mode=mode, num_tokens=max(tokens for _, tokens in both))


def different_sizes(rank: Rank) -> dict[str, Any]:
    runner = runner_of(padded(rank), process_group=rank.group, capture_sizes=[4, 8])
    calls = [(8, 8), (8, 8), (8, 8), (8, 8), (8, 6), (8, 6), (7, 8), (6, 7), (3, 8), (4, 3), (3, 4), (3, 4), (4, 3)]
    right = [padded_call(runner, rank, sizes, seed) for seed, sizes in enumerate(calls)]
    return report(runner, rank, right) | {"refused": dict(runner.padding.refused)}


def different_sizes_at_once(rank: Rank) -> dict[str, Any]:
    """Rank 0 always has the size of the rung, and nothing to prove on its own."""
    runner = runner_of(padded(rank), process_group=rank.group, capture_sizes=[4, 8])
    right = [padded_call(runner, rank, (8, 5), seed) for seed in range(8)]
    return report(runner, rank, right) | {"refused": dict(runner.padding.refused)}


def padding_refused_on_one_rank(rank: Rank) -> dict[str, Any]:
    runner = runner_of(padded(rank, mixes_rows=True), process_group=rank.group, capture_sizes=[4, 8])
    right = [padded_call(runner, rank, (8, 6), seed, mixes=True) for seed in range(8)]
    for seed in range(5):  # the sizes are the same everywhere: exact shapes are captured
        x = same_inputs(5, seed)[0]
        (result,) = runner(5, x)
        expected = x * 2 + 1
        right.append(torch.allclose(result, expected - expected.mean(0) if rank.rank else expected, atol=1e-5))
    return report(runner, rank, right) | {"refused": dict(runner.padding.refused)}


def without_a_common_decision(rank: Rank) -> str:
    """Each rank brings a size of its own, and nobody says a word of it."""
    runner = runner_of(padded(rank), process_group=rank.group)
    n = 3 + 3 * rank.rank
    try:
        for _ in range(3):
            runner(n, torch.ones(n, WIDTH))
    except RankError as error:
        return str(error)
    return "no error"


def weights_moved_on_both_ranks(rank: Rank) -> dict[str, Any]:
    runner, right = _with_weight(rank, rank.group), []
    for seed in range(12):
        inputs, (weight, _) = same_inputs(3, seed), same_inputs(3, seed // 6 + 50)
        kept = weight if seed in (0, 6) else kept  # noqa: F821 - set in the first round
        (result,) = runner(kept, inputs[rank.rank])
        right.append(torch.allclose(result, (inputs[0] + inputs[1]) * kept))
    return report(runner, rank, right)


def weight_moved_on_one_rank(rank: Rank) -> tuple[str, bool]:
    """Rank 1 is told, rank 0 waits for it no longer than its own collective does."""
    runner = _with_weight(rank, rank.patient(2))
    weight, x = torch.ones(3, WIDTH), torch.ones(3, WIDTH)
    for _ in range(4):
        runner(weight, x)
    try:
        runner(weight.clone() if rank.rank == 1 else weight, x)
    except RankError as error:
        rank.all_reduce(x)  # what rank 0 waits for
        return str(error), runner.stats.replays > 0
    return "", runner.stats.replays > 0


def _with_weight(rank: Rank, group: Any) -> GraphRunner:
    region = Region()
    weight, x = region.static("weight"), region.tensor("x")
    total = region.step(rank.all_reduce, region.step(lambda x: x * 1, x), capture=LIVE)
    return runner_of(region.returning(region.step(lambda t, w: t * w, total, weight)), process_group=group)


def replays_say_nothing(rank: Rank) -> tuple[int, int]:
    """How many questions a rank asks until it replays, and how many afterwards."""
    runner = runner_of(layered(rank), process_group=rank.group)
    asked = []
    plain = runner.agreement.gather
    runner.agreement.gather = lambda question, *rest, **usual: asked.append(question) or plain(question, *rest, **usual)  # type: ignore
    for seed in range(4):
        call(runner, rank, 3, seed)
    before = len(asked)
    for seed in range(20):
        call(runner, rank, 3, seed)
    return before, len(asked) - before


def compiled_and_released(rank: Rank) -> dict[str, Any]:
    """The whole way: a compiled function with a sum over the ranks, released by both, then by one alone."""
    library = torch.library.Library("two_ranks", "DEF")
    library.define("total(Tensor x) -> Tensor")
    library.impl("total", rank.all_reduce, "CPU")
    library.impl("total", torch.empty_like, "Meta")

    def model(x: Tensor) -> Tensor:
        return torch.ops.two_ranks.total(x + 1) * 2

    compiled = graphcap.compile(
        model, compiler="eager", simulate=True, cudagraph_mode="PIECEWISE", process_group=rank.patient(3)
    )
    right: list[bool] = []

    def calls(n: int, number: int = 4) -> int:
        for seed in range(number):
            inputs = same_inputs(n, seed)
            with torch.no_grad():
                right.append(torch.allclose(compiled(inputs[rank.rank]), (inputs[0] + inputs[1] + 2) * 2))
        return sum(plan.num_segments for region in graphcap.explain(compiled).regions for plan in region.plans)

    found: dict[str, Any] = {"captured": calls(3)}
    graphcap.release(compiled)
    found["after release"] = calls(3, 0)
    found["captured again"] = calls(3)
    found["alone"] = ""
    if rank.rank == 0:
        calls(3, 1)
    else:
        try:
            graphcap.release(compiled)
        except RankError as error:
            found["alone"] = str(error)
        calls(3, 1)  # it still has its graphs
    return found | {"right": all(right)}


def ladder_captured_beforehand(rank: Rank) -> dict[str, Any]:
    """``graphcap.capture()`` on both ranks; then different sizes by one decision, which needs no question any more."""
    library = torch.library.Library("two_ranks_ladder", "DEF")
    library.define("counted(Tensor x) -> Tensor")
    library.impl("counted", lambda x: x + 0 * rank.all_reduce(torch.ones(1)), "CPU")
    library.impl("counted", torch.empty_like, "Meta")

    def model(x: Tensor) -> Tensor:
        return torch.ops.two_ranks_ladder.counted(x * 2) + 1

    compiled = graphcap.compile(
        model, compiler="eager", simulate=True, process_group=rank.group, capture_sizes=[4, 8],
        dynamic_arg_dims={"x": {0: "num_tokens"}}, cudagraph_mode="PIECEWISE",
    )  # fmt: skip
    summary = graphcap.capture(compiled, lambda key: ((torch.randn(key.num_tokens, WIDTH),), {}))
    agreement = agreement_of(rank.group)
    asked, plain = list[str](), agreement.gather
    agreement.gather = lambda question, *rest, **usual: asked.append(question) or plain(question, *rest, **usual)  # type: ignore
    right = []
    for seed, sizes in enumerate([(8, 6), (5, 8), (3, 4), (4, 3), (8, 8)]):
        x = same_inputs(sizes[rank.rank], seed)[0]
        mine = graphcap.dispatch(compiled, num_tokens=len(x))
        with torch.no_grad(), step(dispatch=_largest(rank, mine)):
            right.append(torch.allclose(compiled(x), x * 2 + 1))
    (region,) = graphcap.explain(compiled).regions
    return {
        "right": all(right),
        "sums": rank.sums,
        "captured": [key.num_tokens for key in summary.captured],
        "replays": region.replays,
        "asked": asked,
    }


class Block(torch.nn.Module):
    """Attention and a linear layer whose rows are spread over the ranks, as in tensor parallelism."""

    def __init__(self, rank: Rank) -> None:
        super().__init__()
        torch.manual_seed(0)
        whole = torch.randn(16, 16) / 4
        self.own = torch.nn.Parameter(whole.chunk(2)[rank.rank].clone())
        self.first = 8 * rank.rank
        self.whole = whole
        self.group = rank.traffic.group_name

    def attend(self, x: Tensor) -> Tensor:
        heads = torch.tanh(x).view(-1, 2, 8).transpose(0, 1).unsqueeze(0)
        mixed = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)
        return mixed.squeeze(0).transpose(0, 1).reshape(-1, 16)

    def forward(self, x: Tensor) -> Tensor:
        part = self.attend(x)[:, self.first : self.first + 8] @ self.own
        total = torch.ops._c10d_functional.all_reduce(part, "sum", self.group)
        return torch.relu(torch.ops._c10d_functional.wait_tensor(total)) + x

    def reference(self, x: Tensor) -> Tensor:
        """The same in one process."""
        return torch.relu(self.attend(x) @ self.whole.to(x.device)) + x


def _compiled(rank: Rank, mode: str) -> dict[str, Any]:
    model = Block(rank).to(rank.device).eval()
    simulated = {} if rank.device.type == "cuda" else {"compiler": "eager", "simulate": True}
    compiled = graphcap.compile(model, cudagraph_mode=mode, process_group=rank.group, capture_sizes=[4, 8], **simulated)
    right = []
    with torch.inference_mode():
        for seed in range(16):
            x = torch.randn(4 + 4 * (seed % 2), 16, generator=torch.Generator().manual_seed(seed)).to(rank.device)
            right.append(torch.allclose(compiled(x), model.reference(x), atol=1e-3))
    plans = [plan for region in graphcap.explain(compiled).regions for plan in region.plans]
    found = {
        "right": all(right),
        "modes": sorted(plan.mode for plan in plans),
        "segments": [plan.num_segments for plan in plans],
        "failures": [reason for region in graphcap.explain(compiled).regions for reason in region.failures],
    }
    graphcap.release(compiled)
    return found


def compiled_full(rank: Rank) -> dict[str, Any]:
    return _compiled(rank, "FULL")


def compiled_piecewise(rank: Rank) -> dict[str, Any]:
    return _compiled(rank, "PIECEWISE")


ALL = {
    each.__name__: each
    for each in (
        same_plans, collectives_in_graphs, failure_in_the_first_segment, failure_in_the_middle,
        failure_in_the_last_segment, sums_before_a_failure, no_room_on_one_rank, out_of_memory_on_one_rank,
        eviction_on_one_rank, live_on_one_rank, different_sizes, different_sizes_at_once, padding_refused_on_one_rank,
        without_a_common_decision, weights_moved_on_both_ranks, weight_moved_on_one_rank, replays_say_nothing,
        compiled_and_released, compiled_full, compiled_piecewise, ladder_captured_beforehand, misfortunes,
    )
}  # fmt: skip
