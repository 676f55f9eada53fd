"""Padding of what Dynamo traced: declared dims from the user's call to a padded replay, on the simulated device."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.decorators import mark_dynamic, mark_unbacked

import graphcap
import graphcap.compiler.backend as backend
from graphcap.compiler.eager_functions import eager
from graphcap.cudagraph import Program
from tests.cudagraph.padded_regions import PaddedCalls, cloned, padding_of, proof_of

WIDTH = 8


@pytest.fixture
def call_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Program, Callable[..., list[Any]]]]:
    """The program of a compiled function, and a function that gives the program's arguments for a call."""
    programs: list[Program] = []
    taken: list[list[Any]] = []

    def capturing(program: Program, *_: Any) -> Callable[..., Any]:
        programs.append(program)

        def run(*args: Any) -> Any:
            taken.append(list(args))
            return program.run(*cloned(args))

        return run

    monkeypatch.setattr(backend, "capturing", capturing)

    def build(fn: Any, declared: Mapping[str, Any] | None, *args: Any, **options: Any) -> Any:
        torch._dynamo.reset()
        options = {"compiler": "eager", "cache": False} | options
        if declared is None:
            compiled = torch.compile(fn, backend="graphcap", options=options)
        else:
            compiled = graphcap.compile(fn, dynamic_arg_dims=declared, **options)

        def arguments(*args: Any) -> list[Any]:
            with torch.no_grad():
                compiled(*args)
            assert len(programs) == 1, "one graph serves every size"
            return taken.pop()

        arguments(*args)
        return programs[0], arguments

    return build


def assert_padded_is_eager(program: Program, calls: list[list[Any]], rung: Mapping[str, int], **settings: Any) -> None:
    padded = PaddedCalls(program, full=False, **settings)
    padded.capture(rung, calls[0])
    for args in calls:
        theirs = cloned(args)
        with torch.no_grad():
            expected = program.run(*theirs)
        for mine, true in zip((*padded(*args), *args), (*expected, *theirs), strict=True):
            torch.testing.assert_close(mine, true)


@eager
def attend(query: Tensor, key: Tensor, cache: Tensor, slots: Tensor) -> Tensor:
    """Slot 0 is nobody's, and a slot of -1 leaves it as it was."""
    place = slots.clamp(min=0)
    cache[place] = torch.where((slots >= 0)[:, None], key, cache[place])
    return query + cache[place]


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qk, self.norm = nn.Embedding(32, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.RMSNorm(WIDTH)

    def forward(self, batch: dict[str, Tensor], cache: Tensor) -> dict[str, Tensor]:
        hidden = self.embed(batch["ids"])
        for _ in range(2):
            query, key = self.qk(self.norm(hidden)).chunk(2, dim=-1)
            hidden = hidden + F.silu(attend(query, key, cache, batch["slots"]))
        return {"hidden": hidden, "last": hidden[batch["starts"][1:] - 1]}


DIMS = {"batch": {"ids": 0, "slots": 0, "starts": {0: "num_reqs+1"}}}


def batch_of(*lengths: int) -> dict[str, Tensor]:
    total = sum(lengths)
    slots = torch.randperm(15)[:total] + 1
    return {"ids": torch.arange(total), "slots": slots, "starts": torch.tensor([0, *lengths]).cumsum(0)}


def test_a_decoder_with_nested_inputs_a_cache_and_live_attention(call_of) -> None:
    torch.manual_seed(0)
    cache = torch.randn(16, WIDTH)
    fills = {"batch.slots": -1, "batch.starts": "edge"}
    program, arguments = call_of(Decoder(), DIMS, batch_of(2, 3), cache, pad=fills)
    padding = padding_of(program, pad=fills)
    assert not padding.refused
    assert sorted(padding.names.values()) == ["num_reqs", "num_tokens"]
    symbols = {name: symbol for symbol, name in padding.names.items()}
    rung = {symbols["num_tokens"]: 8, symbols["num_reqs"]: 4}
    calls = [arguments(batch_of(*lengths), cache) for lengths in ((2, 3), (1,), (1, 1, 1, 1), (4, 4), (2, 3))]
    assert proof_of(program, cloned(calls[0]), rung, pad=fills).reason == ""
    assert_padded_is_eager(program, calls, rung, pad=fills)


def test_a_cache_without_declared_slots_is_not_padded(call_of) -> None:
    program, _ = call_of(Decoder(), DIMS, batch_of(2, 3), torch.randn(16, WIDTH))
    (reason,) = {each for each in padding_of(program).refused.values() if "slots" in each}
    assert "batch.slots says where something is written" in reason


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_a_compiled_piece_at_another_size(call_of, compiler: str) -> None:
    def fn(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return (torch.softmax(x, -1) * y).t(), x.sum(1)

    def pair(n: int) -> tuple[Tensor, Tensor]:
        return torch.randn(n, WIDTH), torch.randn(n, WIDTH)

    program, arguments = call_of(fn, {"x": 0, "y": 0}, *pair(3), compiler=compiler)
    padding = padding_of(program)
    (symbol,) = padding.names
    calls = [arguments(*pair(n)) for n in (3, 1, 4, 2)]
    assert proof_of(program, calls[0], {symbol: 4}).reason == ""
    assert_padded_is_eager(program, calls, {symbol: 4})


@pytest.mark.parametrize("marking", [mark_dynamic, mark_unbacked])
def test_marked_dims_are_padded_on_the_way_of_torch_compile(call_of, marking: Any) -> None:
    x, y = torch.randn(3, WIDTH), torch.randn(3, WIDTH)
    marking(x, 0)
    marking(y, 0)
    program, _ = call_of(lambda x, y: torch.relu(x) * y, None, x, y)
    assert set(padding_of(program).names.values()) <= {"num_tokens", "x.0", "y.0"}
    assert padding_of(program)


def test_a_tensor_that_was_forgotten_keeps_the_size_exact(call_of) -> None:
    program, _ = call_of(lambda x, y: x * y, {"x": 0}, torch.randn(3), torch.randn(3))
    padding = padding_of(program)
    assert not padding
    assert not padding.refused or "y dim 0" in " ".join(padding.refused.values())


def test_a_trailing_size_is_padded_with_its_strides(call_of) -> None:
    program, arguments = call_of(lambda x: x * 2, {"x": -1}, torch.randn(3, 5))
    (symbol,) = padding_of(program).names
    calls = [arguments(torch.randn(3, n)) for n in (5, 2, 8)]
    assert proof_of(program, calls[0], {symbol: 8}).reason == ""
    assert_padded_is_eager(program, calls, {symbol: 8})


def test_a_decoder_is_eager_bit_for_bit_in_every_batch_and_most_are_replays() -> None:
    torch.manual_seed(0)
    model = Decoder().eval()
    original = copy.deepcopy(model)
    fast = graphcap.compile(
        model, dynamic_arg_dims=DIMS, pad={"batch.slots": -1, "batch.starts": "edge"}, compiler="eager", cache=False,
        simulate=True, capture_sizes={"num_tokens": [4, 8], "num_reqs": [2, 4]},
    )  # fmt: skip
    cache = torch.randn(16, WIDTH)
    theirs, lengths = cache.clone(), random.Random(0)
    with torch.no_grad():
        for _ in range(30):
            batch = batch_of(*(lengths.randint(1, 2) for _ in range(lengths.randint(1, 4))))
            expected, got = original(batch, theirs), fast(batch, cache)
            for name, value in expected.items():
                torch.testing.assert_close(got[name], value, rtol=0, atol=0)
                assert got[name].stride() == value.stride()
            torch.testing.assert_close(cache, theirs, rtol=0, atol=0)
    (region,) = graphcap.explain(model).regions
    assert sum(plan.replays for plan in region.plans) >= 15


@pytest.mark.parametrize(
    ("fn", "note"),
    [
        (
            lambda x: x - x.mean(0),
            "num_tokens is not padded: piece_0 mixes rows|num_tokens is not padded: piece_0 depends",
        ),
        (lambda x: x[::2] + 0, "num_tokens is not padded: output 0 has a size that does not follow one symbol"),
    ],
)
def test_why_a_size_is_not_padded_is_in_the_report(fn: Any, note: str) -> None:
    fast = graphcap.compile(
        fn, dynamic_arg_dims={"x": 0}, compiler="eager", cache=False, simulate=True, capture_sizes=[8]
    )
    with torch.no_grad():
        for _ in range(4):
            fast(torch.randn(6, WIDTH))
    (region,) = graphcap.explain(fast).regions
    assert any(re.search(note, each) for each in region.notes), region.notes


def test_a_ladder_without_declared_dims_is_exact_and_the_report_says_so() -> None:
    x = torch.randn(6, WIDTH)
    fast = torch.compile(
        lambda x: x * 2, backend="graphcap", dynamic=True,
        options={"compiler": "eager", "cache": False, "simulate": True, "capture_sizes": [8]},
    )  # fmt: skip
    with torch.no_grad():
        for _ in range(3):
            fast(x)
    (region,) = [each for each in graphcap.explain().regions if "capture_sizes" in " ".join(each.notes)]
    assert any("capture_sizes lists exact sizes" in each for each in region.notes)


@pytest.mark.parametrize("frontend", ["dynamo", "breakable"])
def test_arguments_that_come_to_share_memory_are_not_padded_apart(frontend: str) -> None:
    """What is written into one shows in the other, in the calls that capture for it too."""

    def grown(h: Tensor, residual: Tensor) -> Tensor:
        h.add_(1)
        return h + residual

    dims = {"h": 0, "residual": 0}
    options: Any = {"compiler": "eager", "simulate": True, "cache": False, "capture_sizes": [4, 8]}
    compiled = graphcap.compile(grown, dynamic_arg_dims=dims, frontend=frontend, **options)
    with torch.inference_mode():
        for number in range(14):
            h = torch.randn(3, 4)
            expected = h + 1
            residual = h.view_as(h) if number >= 4 else torch.randn(3, 4)
            result = 2 * expected if number >= 4 else expected + residual
            torch.testing.assert_close(compiled(h, residual), result)
            torch.testing.assert_close(h, expected)


@torch.library.custom_op("graphcap_test_padded::gathered", mutates_args=())
def gathered(x: Tensor) -> Tensor:
    pages = graphcap.current_step().inputs["pages"]
    seen_pages.append((tuple(pages.shape), pages.data_ptr()))
    return x + pages.sum(1, keepdim=True)


@gathered.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


seen_pages: list[tuple[tuple[int, ...], int]] = []


def serve_pages(dim: Any) -> tuple[graphcap.Report, list[tuple[tuple[int, ...], int]]]:
    """Steps whose table of pages has another width each, read by an op that a graph may hold."""
    graphcap.register_op("graphcap_test_padded::gathered", capture="always")
    dims = {"x": 0, "step.pages": {0: "num_tokens", 1: dim}}
    options: Any = {"compiler": "eager", "simulate": True, "cache": False, "capture_sizes": [4, 8]}
    model = graphcap.compile(lambda x: gathered(x * 2) + 1, dynamic_arg_dims=dims, **options)
    seen_pages.clear()
    with torch.inference_mode():
        for n, width in [(3, 2), (3, 5), (4, 1), (3, 6), (3, 2), (2, 3), (3, 4), (7, 2), (7, 6), (5, 5)]:
            x, pages = torch.randn(n, WIDTH), torch.randn(n, width)
            with graphcap.step(num_tokens=n, inputs={"pages": pages}):
                torch.testing.assert_close(model(x), x * 2 + pages.sum(1, keepdim=True) + 1)
    return graphcap.explain(model), list(seen_pages)


def test_a_step_input_with_a_largest_size_is_in_a_buffer_of_it_for_the_ops_of_a_graph() -> None:
    report, seen = serve_pages(graphcap.Dim("pages", max=6))
    (region,) = report.regions
    assert {plan.key for plan in region.plans} == {(4,), (8,)}
    assert region.replays >= 4
    assert {shape for shape, _ in seen[-3:]} == {(8, 6)}
    assert not any("not padded" in note for note in region.notes)


def test_a_step_input_of_a_size_that_nothing_tells_is_in_no_graph() -> None:
    """Its tensor is the engine's own, and would be somewhere else at the next replay."""
    report, _ = serve_pages("pages")
    (region,) = report.regions
    assert region.plans == ()
    assert any("step input 'pages', whose dim 'pages' follows no size" in each for each in region.live_calls)
