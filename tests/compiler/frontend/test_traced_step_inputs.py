"""Inputs of a step that the model reads in traced code: ordinary inputs of its graph, those of the step that calls."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphcap
from graphcap import DimError, GraphKey, StepError, native, step
from graphcap.compiler.frontend.api import record_of
from graphcap.compiler.frontend.sealed_function import SealedFunction

SETTINGS: dict[str, Any] = {"compiler": "eager", "simulate": True, "cache": False, "capture_sizes": [2, 4, 8]}
DIMS = {"x": 0, "step.scale": 0}
WIDTH = 16  #: unlike any number of rows: torch.compile(dynamic=True) takes equal sizes for one

#: Makes a model that runs compiled out of one that does not.
Way = Callable[..., Any]


def _decorator_like(model: Any, **settings: Any) -> Any:
    return graphcap.compile(model, **{"dynamic_arg_dims": DIMS, **SETTINGS, **settings})


def _sealed(model: Any, **settings: Any) -> Any:
    return _decorator_like(model, guards="sealed", **settings)


def _torch_compile(model: Any, **settings: Any) -> Any:
    options = {"dynamic_arg_dims": DIMS, **SETTINGS, **settings}
    return torch.compile(model, backend="graphcap", dynamic=True, options=options)


@pytest.fixture(params=[_decorator_like, _sealed, _torch_compile], ids=["full", "sealed", "torch.compile"])
def way(request: pytest.FixtureRequest) -> Way:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def _serving(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """Without grad. Without a GPU seals are as if the C++ checks were there; those in Python have the same contract."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(native, "status", lambda: "extension")
    with torch.no_grad():
        yield


class Scaled(nn.Module):
    """Row-wise: multiplies by the ``scale`` of the step, ``[num_tokens]``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * graphcap.current_step().inputs["scale"][:, None]


def call(model: Any, original: Scaled, n: int, **others: Any) -> None:
    """One step of ``n`` tokens with values of its own, which has to give what the operators give."""
    x, scale = torch.randn(n, WIDTH), torch.randn(n)
    with step(num_tokens=n, inputs={"scale": scale, **others}):
        found = model(x)
    torch.testing.assert_close(found, torch.nn.functional.linear(x, *original.linear.parameters()) * scale[:, None])


def regions(model: Any) -> list[Any]:
    return graphcap.explain(model).regions


def replays(model: Any) -> int:
    return sum(region.replays for region in regions(model))


def bindings(model: Any) -> dict[str, str]:
    return {name: how for region in regions(model) for name, how in region.bindings.items()}


# -- unpadded and padded


def test_every_step_brings_its_own_tensor(way: Way) -> None:
    original = Scaled()
    model = way(original)
    for _ in range(4):
        for n in (4, 8):
            call(model, original, n)
    assert len(regions(model)) == 1, "nothing is traced again"
    assert replays(model) == 4


def test_it_is_padded_as_the_arguments_are(way: Way) -> None:
    original = Scaled()
    model = way(original)
    for _ in range(4):
        for n in (3, 7, 4, 5):
            call(model, original, n)
    (region,) = regions(model)
    assert sorted(plan.key for plan in region.plans) == [(4,), (8,)]
    assert bindings(model)["step.scale"] == bindings(model)["x"] == "padded"
    assert region.replays >= 10


def test_without_a_device_it_runs_compiled(way: Way) -> None:
    original = Scaled()
    model = way(original, simulate=False)
    for n in (3, 4, 5):
        call(model, original, n)
    assert len(regions(model)) == 1


def test_its_padded_rows_have_the_declared_fill(way: Way) -> None:
    """Rows that are no request's would be written to row 0 otherwise, or padding be refused."""

    class Cache(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("rows", torch.zeros(9, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            slots = graphcap.current_step().inputs["slots"]
            self.rows[slots] = torch.where((slots >= 0)[:, None], x, 0)
            return x + 1

    original = Cache()
    model = way(original, dynamic_arg_dims={"x": 0, "step.slots": 0}, pad={"step.slots": -1})
    expected = torch.zeros(9, WIDTH)
    for n in (3, 3, 3, 4, 4, 4, 3, 1, 2):
        x, slots = torch.randn(n, WIDTH), torch.randperm(8)[:n]
        with step(num_tokens=n, inputs={"slots": slots}):
            assert torch.equal(model(x), x + 1)
        expected[slots] = x
        assert torch.equal(original.rows[:8], expected[:8])
    assert bindings(model)["step.slots"] == "padded"
    assert replays(model) >= 3


def test_a_write_index_without_a_fill_is_not_padded() -> None:
    def store(x: Tensor, cache: Tensor) -> Tensor:
        slots = graphcap.current_step().inputs["slots"]
        cache[slots] = torch.where((slots >= 0)[:, None], x, 0)
        return x + 1

    model = _decorator_like(store, dynamic_arg_dims={"x": 0, "step.slots": 0})
    cache, expected = torch.zeros(9, WIDTH), torch.zeros(9, WIDTH)
    for _ in range(4):
        x, slots = torch.randn(3, WIDTH), torch.randperm(8)[:3]
        with step(num_tokens=3, inputs={"slots": slots}):
            model(x, cache)
        expected[slots] = x
    assert torch.equal(cache, expected)
    assert "step.slots says where" in str(graphcap.explain(model))


def test_an_undeclared_one_keeps_the_batch_at_its_size() -> None:
    original = Scaled()
    model = _decorator_like(original, dynamic_arg_dims={"x": 0})
    for _ in range(4):
        for n in (3, 4):
            call(model, original, n)
    assert "padded" not in bindings(model).values()


def test_a_dim_of_its_own_is_padded_by_its_own_name(way: Way) -> None:
    """Requests are counted in the step alone, and one that follows them has one element more."""

    class Mixed(nn.Module):
        def forward(self, x: Tensor) -> Any:
            inputs = graphcap.current_step().inputs
            return x * 2, inputs["lens"] + 1, inputs["starts"] * 3

    dims = {"x": 0, "step.lens": {0: "num_reqs"}, "step.starts": {0: "num_reqs+1"}}
    ladder = {"num_tokens": [4, 8], "num_reqs": [2, 4]}
    model = way(Mixed(), dynamic_arg_dims=dims, capture_sizes=ladder, pad={"step.starts": "edge"})
    for n, reqs in [(7, 3), (7, 3), (7, 3), (3, 3), (7, 3), (6, 4), (8, 4), (7, 4), (3, 2), (4, 2), (5, 4)]:
        x, lens, starts = torch.randn(n, WIDTH), torch.randn(reqs), torch.randn(reqs + 1)
        with step(num_tokens=n, num_reqs=reqs, inputs={"lens": lens, "starts": starts}):
            found = model(x)
        for one, other in zip(found, (x * 2, lens + 1, starts * 3), strict=True):
            assert torch.equal(one, other)
    assert len(regions(model)) == 1
    assert replays(model) >= 3


CALLS = st.tuples(st.integers(1, 9), st.sampled_from([(), ("scale",), ("scale", "bias"), ("scale", "other")]))


@pytest.mark.parametrize("make", [_decorator_like, _sealed, _torch_compile])
@given(calls=st.lists(CALLS, min_size=1, max_size=12))
@settings(max_examples=5)
def test_any_sequence_of_steps_is_served_as_the_function_itself_would(make: Way, calls: list[Any]) -> None:
    def fn(x: Tensor) -> Tensor:
        inputs = graphcap.current_step().inputs
        scaled = x * inputs["scale"][:, None]
        return scaled if inputs.get("bias") is None else scaled + inputs["bias"][:, None]

    torch._dynamo.reset()
    model = make(fn, dynamic_arg_dims={"x": 0, "step.scale": 0, "step.bias": 0})
    for n, names in calls:
        x = torch.randn(n, WIDTH)
        with step(n, inputs={name: torch.randn(n) for name in names}):
            if names:
                torch.testing.assert_close(model(x), fn(x))
                continue
            with pytest.raises(StepError, match="no input 'scale'"):
                model(x)


# -- which step


def test_no_step_is_an_error_and_the_next_call_is_served(way: Way) -> None:
    original = Scaled()
    model = way(original)
    for _ in range(3):
        call(model, original, 4)
    for _ in range(2):
        with pytest.raises(StepError, match=r"no graphcap\.step"):
            model(torch.randn(4, WIDTH))
    before = replays(model)
    call(model, original, 4)
    assert replays(model) == before + 1


def test_a_step_that_lacks_the_input_is_an_error_that_names_it(way: Way) -> None:
    original = Scaled()
    model = way(original)
    for _ in range(3):
        call(model, original, 4)
    with pytest.raises(StepError, match="no input 'scale'; did you mean 'scales'"), step(4, inputs={"scales": 1}):
        model(torch.randn(4, WIDTH))
    call(model, original, 4)


def test_a_first_call_without_a_step_is_the_same_error(way: Way) -> None:
    original = Scaled()
    model = way(original)
    with pytest.raises(StepError, match=r"no graphcap\.step"):
        model(torch.randn(4, WIDTH))
    for _ in range(4):
        call(model, original, 4)
    assert replays(model) >= 2


def test_what_else_a_step_brings_does_not_matter(way: Way) -> None:
    original = Scaled()
    model = way(original)
    for number in range(4):
        call(model, original, 4, **{f"other{number}": torch.ones(number)})
    assert len(regions(model)) == 1


def test_the_innermost_step_counts(way: Way) -> None:
    original = Scaled()
    model = way(original)
    x, outer, inner = torch.randn(4, WIDTH), torch.randn(4), torch.randn(4)
    plain = torch.nn.functional.linear(x, *original.linear.parameters())
    for _ in range(4):
        with step(4, inputs={"scale": outer}):
            with step(4, inputs={"scale": inner}):
                torch.testing.assert_close(model(x), plain * inner[:, None])
            torch.testing.assert_close(model(x), plain * outer[:, None])
            with pytest.raises(StepError), step(4):
                model(x)
    assert replays(model) >= 4


def test_each_thread_has_its_own(way: Way) -> None:
    original = Scaled()
    model = way(original)
    call(model, original, 4)
    meet, failures = threading.Barrier(2), []

    def serve(value: float) -> None:
        try:
            with torch.no_grad():
                for _ in range(20):
                    x = torch.randn(4, WIDTH)
                    with step(4, inputs={"scale": torch.full((4,), value)}):
                        meet.wait()
                        found = model(x)
                        meet.wait()
                    torch.testing.assert_close(found, original.linear._call_impl(x) * value)
        except BaseException as error:
            failures.append(error)
            meet.abort()

    threads = [threading.Thread(target=serve, args=(value,)) for value in (2.0, 3.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_each_task_has_its_own_across_an_await(way: Way) -> None:
    original = Scaled()
    model = way(original)
    call(model, original, 4)

    async def serve(value: float) -> None:
        for _ in range(4):
            x = torch.randn(4, WIDTH)
            with step(4, inputs={"scale": torch.full((4,), value)}):
                await asyncio.sleep(0)  # the other task enters a step in the same thread
                torch.testing.assert_close(model(x), original.linear._call_impl(x) * value)
            await asyncio.sleep(0)
            with pytest.raises(StepError):
                model(x)

    async def both() -> None:
        await asyncio.gather(serve(2.0), serve(3.0))

    asyncio.run(both())


@pytest.mark.parametrize("make", [_decorator_like, _torch_compile])
def test_where_graphs_must_be_whole_they_are_and_an_error_says_why_not(make: Way) -> None:
    def fn(x: Tensor) -> Tensor:
        return x * graphcap.current_step().inputs["scale"][:, None]

    whole = (
        _decorator_like(fn, fullgraph=True)
        if make is _decorator_like
        else torch.compile(fn, backend="graphcap", fullgraph=True, options={**SETTINGS, "dynamic_arg_dims": DIMS})
    )
    x, scale = torch.randn(4, WIDTH), torch.randn(4)
    with step(4, inputs={"scale": scale}):
        torch.testing.assert_close(whole(x), x * scale[:, None])
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"no graphcap\.step"):
        whole(x)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="no input 'scale'"), step(4, inputs={"scales": scale}):
        whole(x)


def test_a_step_that_is_entered_again_brings_what_its_tensors_hold_by_then(way: Way) -> None:
    original = Scaled()
    model = way(original)
    scale = torch.randn(4)
    kept = step(4, inputs={"scale": scale})
    for _ in range(5):
        scale.data = torch.randn(4)
        x = torch.randn(4, WIDTH)
        with kept:
            found = model(x)
        torch.testing.assert_close(found, torch.nn.functional.linear(x, *original.linear.parameters()) * scale[:, None])


# -- what else can be asked of a step


def test_an_optional_one(way: Way) -> None:
    """One graph for each answer, and neither serves the other."""

    class Optional(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            inputs = graphcap.current_step().inputs
            bias = inputs.get("bias")
            x = x * 2 if bias is None else x * 2 + bias
            return x - 1 if "shift" in inputs else x

    model = way(Optional(), dynamic_arg_dims={"x": 0})
    for _ in range(4):
        for names in ((), ("bias",), ("shift",), ("bias", "shift")):
            x, brought = torch.randn(4, WIDTH), {name: torch.randn(WIDTH) for name in names}
            with step(4, inputs=brought):
                found = model(x)
            torch.testing.assert_close(found, x * 2 + brought.get("bias", 0) - int("shift" in names))
    assert len(regions(model)) == 4
    assert replays(model) >= 4


def test_values_that_are_no_tensors(way: Way) -> None:
    class Valued(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            inputs = graphcap.current_step().inputs
            x = x if inputs["bias"] is None else x + inputs["bias"]
            return (x * inputs["times"]).relu() if inputs["kind"] == "relu" else x * inputs["times"]

    model = way(Valued(), dynamic_arg_dims={"x": 0})
    for times in (2, 3, 5, 2, 3):
        for kind in ("relu", "none"):
            for bias in (None, torch.randn(WIDTH)):
                x = torch.randn(4, WIDTH)
                with step(4, inputs={"bias": bias, "times": times, "kind": kind}):
                    found = model(x)
                expected = (x if bias is None else x + bias) * times
                torch.testing.assert_close(found, expected.relu() if kind == "relu" else expected)


def test_the_batch_itself(way: Way) -> None:
    class Counted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            key = graphcap.current_step().key
            return x * key.num_reqs if key.uniform_query_len == 1 else x

    model = way(Counted(), dynamic_arg_dims={"x": 0})
    for _ in range(3):
        for reqs in (4, 2, 3):
            x = torch.randn(4, WIDTH)
            with step(num_tokens=4, num_reqs=reqs):
                assert torch.equal(model(x), x)
        with step(num_tokens=4, num_reqs=4, uniform_query_len=1):
            assert torch.equal(model(x), x * 4)


def test_nested_inputs_and_all_of_them(way: Way) -> None:
    class Nested(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            inputs = graphcap.current_step().inputs
            for name in sorted(inputs):
                x = x + inputs[name]["rows"][:, None] if name == "meta" else x * inputs[name][0]
            return x * len(inputs)

    model = way(Nested(), dynamic_arg_dims={"x": 0, "step.meta.rows": 0})
    for n in (3, 3, 3, 4, 2, 4):
        x, rows, factor = torch.randn(n, WIDTH), torch.randn(n), torch.randn(())
        with step(n, inputs={"meta": {"rows": rows}, "factors": [factor]}):
            torch.testing.assert_close(model(x), (x * factor + rows[:, None]) * 2)
    assert bindings(model)["step.meta.rows"] == "padded"


@dataclass
class Metadata:
    scale: Tensor


@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        (lambda scale: scale, lambda found: found),
        (lambda scale: {"a": [scale]}, lambda found: found["a"][0]),
        (Metadata, lambda found: found.scale),
    ],
    ids=["itself", "nested", "dataclass"],
)
def test_a_tensor_that_is_an_argument_too(way: Way, wrap: Callable[..., Any], unwrap: Callable[..., Any]) -> None:
    """Dynamo leaves out the guard that two such tensors are one: a graph for one tensor would serve two."""

    class Twice(nn.Module):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return x * scale[:, None] + unwrap(graphcap.current_step().inputs["scale"])[:, None]

    for first in (True, False):
        model = way(Twice(), dynamic_arg_dims={"x": 0, "scale": 0})
        for number in range(6):
            x, scale = torch.randn(4, WIDTH), torch.randn(4)
            other = scale if (number == 0) == first else torch.randn(4)
            with step(4, inputs={"scale": wrap(other)}):
                torch.testing.assert_close(model(x, scale), x * scale[:, None] + other[:, None])
        torch._dynamo.reset()


# -- together with the rest


def test_ops_and_traced_code_read_the_same_input(way: Way) -> None:
    """Of a padded call the op finds a padded tensor, as ever; the graph has one of its own."""

    @graphcap.eager
    def attention(x: Tensor) -> Tensor:
        scale = graphcap.current_step().inputs["scale"]
        seen.append(scale.shape[0])
        return x * scale[0]

    class Both(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return attention(x * graphcap.current_step().inputs["scale"][:, None]) * 2

    seen: list[int] = []
    model = way(Both())
    for n in (3, 3, 3, 3, 3, 4, 3):
        x, scale = torch.randn(n, WIDTH), torch.randn(n)
        with step(n, inputs={"scale": scale}):
            torch.testing.assert_close(model(x), x * scale[:, None] * scale[0] * 2)
    assert replays(model) >= 2
    assert (seen[0], seen[-1]) == (3, 4)


def test_what_an_op_compiles_finds_the_padded_tensor() -> None:
    """Traced code of an op is no part of the graph that the op is in: it reads what the op would read."""

    @torch.compile(backend="eager", dynamic=True)
    def inner(x: Tensor) -> Tensor:
        scale = graphcap.current_step().inputs["scale"]
        seen.append(scale.shape[0])
        return x * scale[0]

    @graphcap.eager
    def attention(x: Tensor) -> Tensor:
        return inner(x)

    class Outer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return attention(x * 2) * 2

    seen: list[int] = []
    model = _decorator_like(Outer())
    for n in (3, 3, 3, 3, 3, 4, 3):
        x, scale = torch.randn(n, WIDTH), torch.randn(n)
        with step(n, inputs={"scale": scale}):
            torch.testing.assert_close(model(x), x * scale[0] * 4)
    assert replays(model) >= 2
    assert (seen[0], seen[-1]) == (3, 4)


def test_the_ladder_is_captured_with_it() -> None:
    def make(key: GraphKey) -> Any:
        return (torch.randn(key.num_tokens, WIDTH),), {}, {"scale": torch.randn(key.num_tokens)}

    original = Scaled()
    model = _decorator_like(original)
    summary = graphcap.capture(model, make)
    assert [key.num_tokens for key in summary.captured] == [8, 4, 2]
    before = replays(model)
    with graphcap.allow_capture(False):
        for n in (1, 3, 5, 8):
            assert graphcap.dispatch(model, num_tokens=n).mode.name == "FULL"
            call(model, original, n)
    assert replays(model) == before + 4


def test_the_ladder_is_captured_with_inputs_like_those_of_a_call() -> None:
    original = Scaled()
    model = _decorator_like(original)
    summary = graphcap.capture(model)
    call(model, original, 3)
    assert [key.num_tokens for key in summary.captured] == [8, 4, 2], summary
    before = replays(model)
    with graphcap.allow_capture(False):
        for n in (1, 3, 5, 8):
            call(model, original, n)
    assert replays(model) == before + 4


def test_a_dispatch_and_a_veto_are_kept_to(way: Way) -> None:
    original = Scaled()
    model = way(original)
    for _ in range(3):
        call(model, original, 8)
    x, scale = torch.randn(3, WIDTH), torch.randn(3)
    expected = torch.nn.functional.linear(x, *original.linear.parameters()) * scale[:, None]
    before = replays(model)
    decision = graphcap.Dispatch(graphcap.CUDAGraphMode.FULL, 8, None, GraphKey(3))
    for _ in range(3):
        with step(dispatch=decision, inputs={"scale": scale}):
            torch.testing.assert_close(model(x), expected)
    assert replays(model) > before
    before = replays(model)
    with step(3, max_mode="NONE", inputs={"scale": scale}):
        torch.testing.assert_close(model(x), expected)
    assert replays(model) == before


def test_the_decorator_has_it_too() -> None:
    @graphcap.support_graph_compile(dynamic_arg_dims=DIMS, **SETTINGS)
    class Decorated(Scaled):
        pass

    original = Decorated()
    for n in (3, 3, 3, 4, 2):
        call(original, original, n)
    assert len(regions(original)) == 1
    assert bindings(original)["step.scale"] == "padded"


# -- declared dims


def test_sizes_that_do_not_agree_with_the_arguments_are_an_error() -> None:
    original = Scaled()
    model = _decorator_like(original)
    for _ in range(2):
        with pytest.raises(DimError, match=r"step\.scale\.shape\[0\] = 3"), step(4, inputs={"scale": torch.ones(3)}):
            model(torch.randn(4, WIDTH))
        for _ in range(3):
            call(model, original, 4)
    assert len([region for region in regions(model) if region.plans]) == 1


def test_a_declared_dim_that_the_tensor_does_not_have_is_an_error() -> None:
    model = _decorator_like(lambda x: x * graphcap.current_step().inputs["scale"].sum())
    for _ in range(2):
        for scale in (torch.ones(()), torch.ones(4)):
            with step(4, inputs={"scale": scale}):
                if scale.dim():
                    model(torch.randn(4, WIDTH))
                    continue
                with pytest.raises(DimError, match=r"step\.scale: dim 0 is declared"):
                    model(torch.randn(4, WIDTH))


def test_a_dim_with_a_largest_size_lives_in_a_buffer_of_it() -> None:
    """One graph serves all sizes of it."""

    class Pages(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            pages, counts = (graphcap.current_step().inputs[name] for name in ("pages", "counts"))
            used = torch.arange(pages.shape[1]) < counts[:, None]
            return x + torch.where(used, pages, 0).sum(1, keepdim=True)

    dims = {"x": 0, "step.counts": 0, "step.pages": {0: "num_tokens", 1: graphcap.Dim("pages", max=6)}}
    model = _decorator_like(Pages(), dynamic_arg_dims=dims)
    for n, num_pages in [(3, 2), (3, 2), (3, 2), (3, 5), (4, 3), (2, 6), (3, 2)]:
        x, pages = torch.randn(n, WIDTH), torch.randn(n, num_pages)
        with step(n, inputs={"pages": pages, "counts": torch.full((n,), num_pages)}):
            torch.testing.assert_close(model(x), x + pages.sum(1, keepdim=True))
    (region,) = regions(model)
    assert len({plan.key[0] for plan in region.plans}) == len(region.plans)
    assert region.replays >= 2


def test_what_only_ops_read_may_have_the_padded_size() -> None:
    """An engine builds metadata at the sizes of a dispatch; nothing in the graph relies on those of the step."""

    @graphcap.eager
    def attention(x: Tensor) -> Tensor:
        return x + graphcap.current_step().inputs["scale"][0]

    model = _decorator_like(lambda x: attention(x * 2), dynamic_arg_dims={"x": 0, "step.scale": 0})
    for _ in range(4):
        x, scale = torch.randn(3, WIDTH), torch.randn(4)
        with step(3, inputs={"scale": scale}):
            torch.testing.assert_close(model(x), x * 2 + scale[0])


def test_dims_of_the_step_alone() -> None:
    class Rows(nn.Module):
        def forward(self) -> Tensor:
            return graphcap.current_step().inputs["rows"] * 2

    model = _decorator_like(Rows(), dynamic_arg_dims={"step.rows": 0})
    for n in (1, 3, 3, 3, 7, 4, 2):
        rows = torch.randn(n, WIDTH)
        with step(n, inputs={"rows": rows}):
            assert torch.equal(model(), rows * 2)
    assert len(regions(model)) == 1
    assert bindings(model)["step.rows"] == "padded"


def test_no_mark_of_a_trace_is_left_on_it(way: Way) -> None:
    scale = torch.randn(4)
    with step(4, inputs={"scale": scale}):
        way(Scaled())(torch.randn(4, WIDTH))
    assert not vars(scale)


def test_a_dim_that_the_user_marked() -> None:
    """Without declared dims torch.compile goes by marks, on inputs of the step as on arguments."""
    original = Scaled()
    model = torch.compile(original, backend="graphcap", options=SETTINGS)
    for n in (3, 4, 3, 3, 8, 1, 5, 3):
        x, scale = torch.randn(n, WIDTH), torch.randn(n)
        for tensor in (x, scale):
            torch._dynamo.decorators.mark_unbacked(tensor, 0)
        with step(n, inputs={"scale": scale}):
            expected = torch.nn.functional.linear(x, *original.linear.parameters()) * scale[:, None]
            torch.testing.assert_close(model(x), expected)
    assert len(regions(model)) == 1
    assert bindings(model)["step.scale"] == "padded"


# -- the ways around Dynamo


@pytest.mark.parametrize("make", [_decorator_like, _sealed])
def test_calls_go_around_dynamo(make: Way) -> None:
    original = Scaled()
    model = make(original)
    call(model, original, 4)
    target = record_of(model)
    assert target is not None
    assert not target.direct.refused
    before = target.direct.count
    for n in (4, 3, 4):
        call(model, original, n)
    assert target.direct.count == before + 3


def test_no_guard_on_the_step_is_left_out_when_sealed() -> None:
    original = Scaled()
    model = _sealed(original)
    for _ in range(3):
        call(model, original, 4)
    left_out = graphcap.explain(model).unchecked_guards
    assert left_out, "there is something to seal"
    assert not [guard for guard in left_out if "in_force.step" in guard or "in_force.has_" in guard]
    target = record_of(model)
    assert target is not None
    (sealed,) = [way.quick for way in target.direct._ways]
    assert isinstance(sealed, SealedFunction)
    assert [each for each in sealed.on_arguments.unaliased if each.endswith("in_force.input_scale")], "as an argument"


def test_a_sealed_call_that_looks_like_an_earlier_one_needs_no_guards(evaluations: list[bool]) -> None:
    """The inputs of its step look like those of the earlier one, and are its own."""
    original = Scaled()
    model = _sealed(original)
    for _ in range(4):
        for n in (3, 4):
            call(model, original, n)
    known = len(evaluations)
    for n in (3, 4, 4, 3):
        call(model, original, n)
    assert len(evaluations) == known
    call(model, original, 5)
    assert len(evaluations) > known, "other sizes"
    for wrong in ({"scale": torch.ones(4, dtype=torch.float64)}, {"scale": torch.ones(8)[::2]}):
        known, x = len(evaluations), torch.randn(4, WIDTH)
        with step(4, inputs=wrong):
            expected = torch.nn.functional.linear(x, *original.linear.parameters()) * wrong["scale"][:, None]
            torch.testing.assert_close(model(x), expected)
        assert len(evaluations) > known


def test_a_sealed_call_without_an_input_looks_like_no_call_with_it(evaluations: list[bool]) -> None:
    class Optional(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if "bias" not in graphcap.current_step().inputs else x - 1

    model = _sealed(Optional(), dynamic_arg_dims={"x": 0})
    for _ in range(3):
        for inputs, expected in ({}, 2.0), ({"bias": 1}, 0.0), ({"other": 1}, 2.0):
            with step(4, inputs=inputs):
                assert model(torch.ones(4, WIDTH)).mean() == expected
    known = len(evaluations)
    with step(4, inputs={"new": 1}):
        assert model(torch.ones(4, WIDTH)).mean() == 2
    assert len(evaluations) == known


def test_a_parameter_as_an_input_of_the_step_is_noticed_when_sealed() -> None:
    """Two inputs of a graph that are one tensor are another graph."""
    original = Scaled()
    original.gain = nn.Parameter(torch.randn(4, 1))
    original.forward = lambda x: x * original.gain + graphcap.current_step().inputs["scale"]
    model = _sealed(original)
    for number in range(6):
        x, scale = torch.randn(4, WIDTH), original.gain if number == 4 else torch.randn(4, 1)
        with step(4, inputs={"scale": scale}):
            torch.testing.assert_close(model(x), x * original.gain + scale)


@pytest.mark.gpu
@pytest.mark.parametrize("guards", ["full", "sealed"])
def test_on_a_gpu(guards: str) -> None:
    """Padded, replayed, and of each step, with the C++ checks that there are."""

    class Cache(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)
            self.register_buffer("rows", torch.zeros(9, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            inputs = graphcap.current_step().inputs
            slots = inputs["slots"]
            self.rows[slots] = torch.where((slots >= 0)[:, None], x, 0)
            return self.linear(x) * inputs["scale"][:, None]

    original = Cache().cuda()
    dims, settings = {"x": 0, "step.slots": 0, "step.scale": 0}, {**SETTINGS, "simulate": False, "guards": guards}
    model: Any = graphcap.compile(original, dynamic_arg_dims=dims, pad={"step.slots": -1}, **settings)
    expected = torch.zeros(9, WIDTH, device="cuda")
    with torch.inference_mode():
        for n in (3, 3, 3, 4, 4, 7, 7, 7, 3, 1, 2, 5):
            x, scale, slots = torch.randn(n, WIDTH).cuda(), torch.randn(n).cuda(), torch.randperm(8)[:n].cuda()
            with step(num_tokens=n, inputs={"slots": slots, "scale": scale}):
                found = model(x)
            torch.testing.assert_close(
                found, torch.nn.functional.linear(x, *original.linear.parameters()) * scale[:, None]
            )
            expected[slots] = x
            assert torch.equal(original.rows[:8], expected[:8])
    assert len(regions(model)) == 1
    assert bindings(model)["step.slots"] == bindings(model)["step.scale"] == "padded"
    assert replays(model) >= 5
