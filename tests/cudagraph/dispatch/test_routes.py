"""Which mode and which rung a call gets: every mode, uniform and mixed batches, vetoes and decisions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from graphcap.config import Config, CUDAGraphMode
from graphcap.cudagraph import Capture, Dispatch, GraphKey, InputKind, InputSpec, Program, Size, Step, step
from graphcap.cudagraph.dispatch.phase import Keeper, Phase, allow_capture, in_phase
from graphcap.cudagraph.dispatch.route import Batch, Route
from graphcap.cudagraph.dispatch.routes import Router
from graphcap.cudagraph.padded.padding import Padding
from tests.cudagraph.regions import Region, randn, runner_of

NONE, PIECEWISE, FULL = CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL


def serving_program(attention: Capture = Capture.UNIFORM) -> Program:
    """Tokens everywhere, requests in the metadata that attention reads."""
    inputs = (
        InputSpec("x", InputKind.TENSOR, sizes=(Size("t"), 4), dim_names={0: "num_tokens"}),
        InputSpec("lens", InputKind.TENSOR, sizes=(Size("r"),), dim_names={0: "num_reqs"}),
        InputSpec("t", InputKind.SCALAR, symbol="t", in_key=True),
        InputSpec("r", InputKind.SCALAR, symbol="r", in_key=True),
    )
    steps = (
        Step("piece_0", lambda x: (x * 2,), (0,), (4,), symbols=frozenset("t")),
        Step("attention", lambda x, lens: (x + lens.sum(),), (4, 1), (5,), (), attention, "opaque", frozenset("tr")),
        Step("piece_1", lambda x: (x - 1,), (5,), (6,), symbols=frozenset("t")),
    )

    def run(x: Any, lens: Any, t: int, r: int) -> tuple[Any, ...]:
        return (x * 2 + lens.sum() - 1,)

    return Program("serving", inputs, steps, (6,), run, ((Size("t"), 4),))


def modes_of(mode: str, sizes: tuple[int, int], said: step | None, attention: Capture = Capture.UNIFORM) -> list[str]:
    program = serving_program(attention)
    config = Config(cudagraph_mode=CUDAGraphMode[mode], max_padding_ratio=0)
    routes = Router(program, config, Padding(program, config)).routes(sizes, said)
    return [] if isinstance(routes, str) else [route.mode.name for route in routes]


UNIFORM = {"num_tokens": 6, "num_reqs": 6, "uniform_query_len": 1}
MIXED = {"num_tokens": 6, "num_reqs": 2}


@pytest.mark.parametrize(
    ("mode", "uniform", "mixed"),
    [
        ("NONE", [], []),
        ("PIECEWISE", ["PIECEWISE"], ["PIECEWISE"]),
        ("FULL", ["FULL"], ["FULL"]),
        ("FULL_DECODE_ONLY", ["FULL"], []),
        ("FULL_AND_PIECEWISE", ["FULL", "PIECEWISE"], ["PIECEWISE"]),
        ("AUTO", ["FULL", "PIECEWISE"], ["PIECEWISE"]),
    ],
)
def test_each_mode_for_each_kind_of_batch(mode: str, uniform: list[str], mixed: list[str]) -> None:
    assert modes_of(mode, (6, 6), step(**UNIFORM)) == uniform
    assert modes_of(mode, (6, 2), step(**MIXED)) == mixed


@pytest.mark.parametrize(
    ("mode", "vetoed"),
    [("FULL", ["PIECEWISE"]), ("FULL_DECODE_ONLY", []), ("FULL_AND_PIECEWISE", ["PIECEWISE"]), ("AUTO", ["PIECEWISE"])],
)
def test_a_veto_of_full(mode: str, vetoed: list[str]) -> None:
    assert modes_of(mode, (6, 6), step(**UNIFORM, max_mode="PIECEWISE")) == vetoed
    assert modes_of(mode, (6, 6), step(**UNIFORM, max_mode="NONE")) == []


def test_auto_takes_full_where_every_step_may_be_captured() -> None:
    """Field notes row 24: the mode that was chosen by itself is the slower one."""
    assert modes_of("AUTO", (6, 2), None, Capture.FULL) == ["FULL"]
    assert modes_of("AUTO", (6, 2), None, Capture.NEVER) == ["PIECEWISE"]


def test_an_op_for_single_tokens_is_not_captured_for_more() -> None:
    two_each = step(num_tokens=6, num_reqs=3, uniform_query_len=2)
    assert modes_of("AUTO", (6, 3), two_each, Capture.UNIFORM_SINGLE) == ["PIECEWISE"]
    assert modes_of("AUTO", (6, 3), two_each, Capture.UNIFORM) == ["FULL", "PIECEWISE"]


def test_as_many_tokens_as_requests_is_uniform_without_a_step() -> None:
    assert modes_of("FULL_AND_PIECEWISE", (6, 6), None) == ["FULL", "PIECEWISE"]
    assert modes_of("FULL_AND_PIECEWISE", (6, 3), None) == ["PIECEWISE"], "two tokens each, or five and one"


def routes(sizes: tuple[int, int], said: step | None = None, **settings: Any) -> tuple[Route, ...]:
    program = serving_program()
    config = Config(cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE, max_padding_ratio=0, **settings)
    found = Router(program, config, Padding(program, config)).routes(sizes, said)
    assert not isinstance(found, str), found
    return found


def test_a_piecewise_plan_does_not_depend_on_what_only_live_steps_see() -> None:
    (three,), (four,) = routes((6, 3), step(num_tokens=6)), routes((6, 4), step(num_tokens=6))
    assert three.sizes == (6, None)
    assert three.key == four.key


def test_a_full_plan_depends_on_the_requests_too() -> None:
    full, piecewise = routes((6, 6))
    assert (full.sizes, piecewise.sizes) == ((6, 6), (6, None))
    assert full.named == {"num_tokens": 6, "num_reqs": 6}


def test_a_batch_is_computed_at_the_sizes_that_the_plan_depends_on() -> None:
    route = Route(PIECEWISE, Batch(), (8, None), {"t": 8}, {"num_tokens": 8}, True)
    assert route.computed((6, 2)) == (8, 2)


def test_tags_have_plans_of_their_own_only_where_that_was_asked_for() -> None:
    def key(value: int, **settings: Any) -> Any:
        return routes((6, 2), step(num_tokens=6, num_reqs=2, tags={"lora": value}), **settings)[0].key

    assert key(1) == key(2)
    assert key(1, specialize_tags=("lora",)) != key(2, specialize_tags=("lora",))


def test_a_decision_is_followed() -> None:
    live = step(dispatch=Dispatch(NONE, 6, 6, GraphKey(6, 6, 1)))
    piecewise = step(dispatch=Dispatch(PIECEWISE, 6, 6, GraphKey(6, 6, 1)))
    assert modes_of("FULL_AND_PIECEWISE", (6, 6), live) == []
    assert modes_of("FULL_AND_PIECEWISE", (6, 6), piecewise) == ["PIECEWISE"]


def call(runner: Any, tokens: int, reqs: int) -> torch.Tensor:
    x, lens = randn(tokens, 4), torch.ones(reqs)
    (out,) = runner(x, lens, tokens, reqs)
    assert torch.allclose(out, x * 2 + reqs - 1)
    return out


def test_uniform_batches_replay_one_graph_and_mixed_ones_two() -> None:
    runner = runner_of(serving_program(), cudagraph_mode="FULL_AND_PIECEWISE", capture_after=2, max_padding_ratio=0)
    for _ in range(4):
        call(runner, 6, 6)
        call(runner, 6, 2)
    full, piecewise = runner.stats.plans
    assert (full.mode, full.num_segments, full.replays) == ("FULL", 1, 2)
    assert (piecewise.mode, piecewise.num_segments, piecewise.replays) == ("PIECEWISE", 2, 2)
    assert list(piecewise.live) == ["attention"]


def test_one_piecewise_plan_serves_any_number_of_requests() -> None:
    runner = runner_of(serving_program(), cudagraph_mode="PIECEWISE", capture_after=2, max_padding_ratio=0)
    for reqs in (1, 2, 3, 4, 5):
        call(runner, 6, reqs)
    (plan,) = runner.stats.plans
    assert plan.replays == 3


def test_a_full_plan_that_is_missing_leaves_decode_to_the_piecewise_one() -> None:
    runner = runner_of(serving_program(), cudagraph_mode="FULL_AND_PIECEWISE", capture_after=2, max_padding_ratio=0)
    for _ in range(3):
        call(runner, 6, 2)
    with allow_capture(False):
        call(runner, 6, 6)
    (plan,) = runner.stats.plans
    assert (plan.mode, plan.replays) == ("PIECEWISE", 2)


def test_sealed_calls_run_live_and_are_counted() -> None:
    runner = runner_of(serving_program(), cudagraph_mode="PIECEWISE", capture_after=2, max_padding_ratio=0)
    with allow_capture(False):
        for _ in range(4):
            call(runner, 6, 2)
    assert runner.stats.plans == []
    assert runner.stats.live_calls == {"captures are not allowed (graphcap.allow_capture(False))": 4}
    for _ in range(3):
        call(runner, 6, 2)
    assert len(runner.stats.plans) == 1, "the seal is off again"


def test_dispatch_says_what_the_call_will_do() -> None:
    runner = runner_of(serving_program(), cudagraph_mode="FULL_AND_PIECEWISE", capture_after=2, max_padding_ratio=0)
    assert runner.outlook.dispatch(GraphKey(6, 6, 1), None).mode is FULL
    assert runner.outlook.dispatch(GraphKey(6, 6, 1), PIECEWISE).mode is PIECEWISE
    assert runner.outlook.dispatch(GraphKey(6, 2), None).mode is PIECEWISE
    with allow_capture(False):
        decision = runner.outlook.dispatch(GraphKey(6, 6, 1), None)
    assert (decision.mode, decision.num_tokens, decision.num_reqs) == (NONE, 6, 6)
    assert "not allowed" in decision.reason


def decided(num_tokens: int, num_reqs: int, key: GraphKey) -> step:
    return step(dispatch=Dispatch(PIECEWISE, num_tokens, num_reqs, key))


PADDED = {"cudagraph_mode": "PIECEWISE", "capture_sizes": [2, 4, 8], "pad": {"lens": 1}}


def test_a_decision_pads_to_no_size_that_is_never_captured() -> None:
    found = router(serving_program(), **PADDED, max_capture_size=8)
    (at_limit,) = found.routes((3, 1), decided(8, 1, GraphKey(3, 1)))
    assert (at_limit.rung, at_limit.is_declared) == ({"t": 8}, True)
    assert found.routes((3, 1), decided(9, 1, GraphKey(3, 1))) == "above max_capture_size=8"
    assert found.routes((9, 1), None) == "above max_capture_size=8"


def test_a_decision_pads_to_no_size_at_which_the_pieces_do_not_hold() -> None:
    found = router(replace(serving_program(), bounds={"t": 8}), **PADDED)
    assert "above 8 rows" in str(found.routes((3, 1), decided(9, 1, GraphKey(3, 1))))


def test_a_decided_size_that_is_no_rung_is_not_declared() -> None:
    """It counts against max_plans, and is captured when it has been seen often enough."""
    found = router(serving_program(), **PADDED)
    (on_ladder,) = found.routes((3, 1), decided(8, 1, GraphKey(3, 1)))
    (beside,) = found.routes((3, 1), decided(7, 1, GraphKey(3, 1)))
    assert (on_ladder.is_declared, beside.is_declared) == (True, False)
    assert beside.rung == {"t": 7}, "ranks with this decision all have it"


def test_a_forced_warm_up_and_recording_need_no_sightings() -> None:
    runner = runner_of(serving_program(), cudagraph_mode="PIECEWISE", capture_after=9, max_padding_ratio=0)
    for phase in (Phase.WARM_UP, Phase.WARM_UP, Phase.RECORD):
        with in_phase(phase):
            call(runner, 6, 2)
    call(runner, 6, 2)
    (plan,) = runner.stats.plans
    assert plan.replays == 1


def test_state_that_a_capture_writes_into_is_put_back() -> None:
    region = Region()
    counter, x = region.static("counter"), region.tensor("x")

    def count(counter: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        counter += 1
        return x + counter

    runner = runner_of(region.returning(region.step(count, counter, x, mutates=[counter])))
    state, keeper = torch.zeros(2), Keeper(1 << 20)
    for phase in (Phase.WARM_UP, Phase.RECORD):
        with in_phase(phase, keeper):
            runner(state, torch.ones(2))
    assert state.tolist() == [2, 2]
    keeper.restore()
    assert state.tolist() == [0, 0]
    assert runner(state, torch.ones(2))[0].tolist() == [2, 2]
    assert (runner.stats.replays, state.tolist()) == (1, [1, 1])


def test_state_too_large_to_keep_is_counted() -> None:
    keeper = Keeper(max_bytes=8)
    keeper.keep([torch.zeros(1), torch.zeros(100)])
    assert keeper.not_kept == 400


def grid_program() -> Program:
    """An encoder: a batch of sequences, no dim called num_tokens."""
    x = InputSpec("x", InputKind.TENSOR, sizes=(Size("b"), Size("s"), 4), dim_names={0: "batch", 1: "seq"})
    scalars = [InputSpec(symbol, InputKind.SCALAR, symbol=symbol, in_key=True) for symbol in ("b", "s")]
    piece = Step("piece_0", lambda x: (x * 2,), (0,), (3,), symbols=frozenset("bs"))
    return Program("grid", (x, *scalars), (piece,), (3,), lambda x, b, s: (x * 2,), ((Size("b"), Size("s"), 4),))


def router(program: Program, **settings: Any) -> Router:
    config = Config(**settings)
    return Router(program, config, Padding(program, config))


def test_the_ladder_of_several_dims_is_the_product_with_their_names() -> None:
    keys = router(grid_program(), capture_sizes={"batch": [1, 4], "seq": [8, 16]}).ladder.batches()
    assert [(key.size("batch"), key.size("seq")) for key in keys] == [(4, 16), (4, 8), (1, 16), (1, 8)]
    assert [key.num_tokens for key in keys] == [64, 32, 16, 8]
    assert {key.num_reqs for key in keys} == {None}


def test_of_a_large_product_the_smallest_stay() -> None:
    found = router(grid_program(), capture_sizes={"batch": [1, 4], "seq": [8, 16]}, max_plans=2)
    assert [key.sizes for key in found.ladder.batches()] == [(("batch", 1), ("seq", 16)), (("batch", 1), ("seq", 8))]


def test_a_dim_without_a_ladder_leaves_a_grid_without_one() -> None:
    assert router(grid_program(), capture_sizes={"batch": [1, 4]}).ladder.batches() == []


def test_a_further_dim_multiplies_the_ladder_of_tokens() -> None:
    found = router(serving_program(), capture_sizes={"num_tokens": [4, 8]}, cudagraph_mode="PIECEWISE")
    mixed = [key for key in found.ladder.batches() if key.uniform_query_len is None]
    assert mixed == [GraphKey(8, 8), GraphKey(4, 4)], "requests follow the tokens"
    x, *scalars = grid_program().inputs
    program = replace(grid_program(), inputs=(replace(x, dim_names={0: "num_tokens", 1: "width"}), *scalars))
    found = router(program, capture_sizes={"num_tokens": [4, 8], "width": [2]}, cudagraph_mode="PIECEWISE")
    assert found.ladder.batches() == [GraphKey(8, 8, sizes=(("width", 2),)), GraphKey(4, 4, sizes=(("width", 2),))]


def test_a_batch_short_of_a_rung_is_short_in_every_padded_dim() -> None:
    found = router(grid_program(), capture_sizes={"batch": [3, 4], "seq": [8, 16]})
    short = found.ladder.short_of(GraphKey.of_sizes({"batch": 4, "seq": 16}))
    assert short == GraphKey.of_sizes({"batch": 4, "seq": 15}), "a batch of 3 has a rung of its own"
    assert (
        router(grid_program(), capture_sizes={"batch": [1], "seq": [1]}).ladder.short_of(
            GraphKey.of_sizes({"batch": 1, "seq": 1})
        )
        is None
    )
    tokens = router(serving_program(), capture_sizes={"num_tokens": [4, 8]})
    assert tokens.ladder.short_of(GraphKey(8, 8)) == GraphKey(7, 7)
    assert tokens.ladder.short_of(GraphKey(8, 4, 2)) == GraphKey(6, 3, 2)
    assert tokens.ladder.short_of(GraphKey(1, 1)) is None


def test_no_batch_is_short_of_a_rung_right_above_another() -> None:
    found = router(serving_program(), capture_sizes={"num_tokens": [2, 4, 8]}, max_num_reqs=3)
    assert found.ladder.short_of(GraphKey(3, 3, 1)) is None, "two requests have a rung of their own"
    assert found.ladder.short_of(GraphKey(2, 2, 1)) == GraphKey(1, 1, 1)
    close = router(serving_program(), capture_sizes={"num_tokens": [6, 7, 8]})
    assert close.ladder.short_of(GraphKey(8, 8)) is None
    assert close.ladder.short_of(GraphKey(6, 6)) == GraphKey(5, 5)


def test_dispatch_pads_named_dims() -> None:
    runner = runner_of(grid_program(), capture_sizes={"batch": [1, 4], "seq": [8, 16]})
    decision = runner.outlook.dispatch(GraphKey.of_sizes({"batch": 3, "seq": 11}), None)
    assert (decision.mode, decision.num_tokens, decision.sizes) == (FULL, 64, (("batch", 4), ("seq", 16)))
    beyond = runner.outlook.dispatch(GraphKey.of_sizes({"batch": 5, "seq": 11}), None)
    assert (beyond.mode, beyond.sizes) == (NONE, (("batch", 5), ("seq", 11)))
    assert "above the ladder" in beyond.reason


def test_a_decision_on_named_dims_is_followed() -> None:
    found = router(grid_program(), capture_sizes={"batch": [1, 4, 8], "seq": [8, 16]})
    decided = Dispatch(FULL, 128, None, GraphKey.of_sizes({"batch": 3, "seq": 11}), sizes=(("batch", 8), ("seq", 16)))
    (route,) = found.routes((3, 11), step(dispatch=decided))
    assert route.sizes == (8, 16)


def test_two_numbers_that_follow_one_symbol_are_one_dim() -> None:
    """``starts`` is one longer than the batch, and both lengths reach the graph as numbers."""
    inputs = (
        InputSpec("x", InputKind.TENSOR, sizes=(Size("r"), 4), dim_names={0: "num_reqs"}),
        InputSpec("starts", InputKind.TENSOR, sizes=(Size("r", 1, 1),), dim_names={0: "num_reqs+1"}),
        InputSpec("r", InputKind.SCALAR, symbol="r", in_key=True),
        InputSpec("r1", InputKind.SCALAR, symbol="r + 1", in_key=True, sizes=(Size("r", 1, 1),)),
    )
    piece = Step("piece_0", lambda x, starts: (x + starts[1:, None],), (0, 1), (4,), symbols=frozenset("r"))

    def run(x: Any, starts: Any, r: int, r1: int) -> tuple[Any, ...]:
        return (x + starts[1:, None],)

    program = Program("two", inputs, (piece,), (4,), run, ((Size("r"), 4),))
    runner = runner_of(program, capture_sizes={"num_reqs": [4, 8]}, pad={"starts": "edge"})
    assert (runner.router.dims.symbols, runner.router.dims.names) == (("r",), ("num_reqs",))
    assert runner.router.dims.sizes((3, 4)) == {"r": 3}
    for reqs in (3, 3, 3, 3, 2, 4):
        x, starts = randn(reqs, 4), torch.arange(reqs + 1)
        (out,) = runner(x, starts, reqs, reqs + 1)
        assert torch.equal(out, x + starts[1:, None])
    assert {plan.key for plan in runner.stats.plans} == {(4,)}
    assert {each.size for each in runner.stats.sizes.values()} == {(2,), (3,), (4,)}
    assert {each.rung for each in runner.stats.sizes.values()} == {(4,)}
