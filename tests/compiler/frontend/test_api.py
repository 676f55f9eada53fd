"""graphcap.compile: modules in place, functions and methods, one graph for every size, and what happens when not."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcap
from graphcap.compiler.frontend import dynamo
from graphcap.compiler.frontend import target as targets
from graphcap.compiler.frontend.api import record_of
from graphcap.errors import ConfigError, DimError, RecompileError

SIZES = (3, 7, 1, 2, 0)


@dataclass
class Batch:
    ids: Tensor
    mask: Tensor


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.fc(x) if y is None else self.fc(x) + y

    def generate(self, x: Tensor, num_steps: int) -> Tensor:
        for _ in range(num_steps):
            x = self(x)
        return x


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def rows(num_rows: int) -> Tensor:
    return torch.randn(num_rows, 4)


def assert_same_as_eager(compiled: Callable[..., Any], *args: Any) -> None:
    got = compiled(*args)
    with graphcap.disabled():
        torch.testing.assert_close(got, compiled(*args), rtol=0, atol=0)


# What may be compiled.


def test_a_module_is_compiled_in_place(graphs: list[Any]) -> None:
    model = Linear()
    assert graphcap.compile(model) is model
    assert_same_as_eager(model, rows(3))
    assert len(graphs) == 1


def test_a_function(graphs: list[Any]) -> None:
    def double(x: Tensor) -> Tensor:
        """Twice as much."""
        return x * 2

    compiled = graphcap.compile(double)
    assert (compiled.__name__, compiled.__doc__) == ("double", "Twice as much.")
    for size in SIZES:
        assert_same_as_eager(compiled, rows(size))
    assert len(graphs) == 1


def test_a_decorated_function(graphs: list[Any]) -> None:
    @graphcap.compile
    @torch.inference_mode()
    def double(x: Tensor) -> Tensor:
        return x * 2

    for size in SIZES:
        assert_same_as_eager(double, rows(size))
    assert len(graphs) == 1


def test_bound_methods_do_not_share(graphs: list[Any]) -> None:
    first, second = Linear(), Linear()
    step_1, step_2 = graphcap.compile(first.generate), graphcap.compile(second.generate)
    x = rows(3)
    assert torch.equal(step_1(x, num_steps=2), first.generate(x, 2))
    assert torch.equal(step_2(x, num_steps=2), second.generate(x, 2))
    assert len(graphs) == 2


def test_an_object_with_a_call(graphs: list[Any]) -> None:
    class Scale:
        factor = 3

        def __call__(self, x: Tensor) -> Tensor:
            return x * self.factor

    assert_same_as_eager(graphcap.compile(Scale()), rows(3))
    assert len(graphs) == 1


@pytest.mark.parametrize("layer", [nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU())])
def test_torchs_own_modules(layer: nn.Module, graphs: list[Any]) -> None:
    graphcap.compile(layer, dynamic_arg_dims={"input": 0})
    for size in SIZES:
        assert_same_as_eager(layer, rows(size))
    assert len(graphs) == 1


def test_torchs_own_modules_are_padded() -> None:
    layer = nn.Sequential(nn.ReLU(), nn.Hardtanh())
    graphcap.compile(layer, dynamic_arg_dims={"input": 0}, capture_sizes=[4], compiler="eager", simulate=True)
    for _ in range(4):
        assert_same_as_eager(layer, rows(3))
    (region,) = graphcap.explain(layer).regions
    assert [(plan.key, plan.replays) for plan in region.plans] == [((4,), 1)]


@pytest.mark.parametrize("wrong", [Linear, 7, len])
def test_anything_else_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"graphcap\.compile"):
        graphcap.compile(wrong)


def test_a_compiled_module_is_refused() -> None:
    with pytest.raises(TypeError, match="pass the original module"):
        graphcap.compile(torch.compile(Linear()))


def test_mistakes_are_reported_at_once() -> None:
    with pytest.raises(ConfigError, match="did you mean 'capture_sizes'"):
        graphcap.compile(Linear(), capture_size=[1])
    with pytest.raises(DimError, match="no argument 'xs'"):
        graphcap.compile(Linear(), dynamic_arg_dims={"xs": 0})


def test_without_dynamo_no_pass_can_be_required() -> None:
    with pytest.raises(ConfigError, match=r"require_passes .* frontend='breakable'"):
        graphcap.compile(Linear(), frontend="breakable", require_passes=["add_rms_norm"])
    with pytest.raises(ConfigError, match=r"require_passes .* frontend='breakable'"):
        graphcap.support_graph_compile(frontend="breakable", require_passes=["add_rms_norm"])


# The module stays what it was.


def test_state_dict_repr_and_type_are_unchanged() -> None:
    model = Linear()
    before = (repr(model), list(model.state_dict()), type(model), [name for name, _ in model.named_modules()])
    graphcap.compile(model)
    assert (repr(model), list(model.state_dict()), type(model), [name for name, _ in model.named_modules()]) == before


@pytest.mark.parametrize("clone", [copy.deepcopy, copy.copy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_works_and_is_not_compiled(clone: Callable[[Any], Any], graphs: list[Any]) -> None:
    model = graphcap.compile(Linear())
    x = rows(3)
    expected = model(x)
    twin = clone(model)
    assert torch.equal(twin(x), expected)
    assert record_of(twin) is None
    assert len(graphs) == 1


def test_hooks_fire(graphs: list[Any]) -> None:
    model = graphcap.compile(Linear())
    model.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model.register_forward_hook(lambda module, args, output: output * 3)
    x = rows(3)
    torch.testing.assert_close(model(x), model.fc(x + 1) * 3)
    assert len(graphs) == 1


def test_a_method_that_calls_the_module_runs_it_compiled(graphs: list[Any]) -> None:
    model = graphcap.compile(Linear())
    model.generate(rows(3), num_steps=4)
    assert len(graphs) == 1


def test_a_module_dies_with_its_last_reference(graphs: list[Any]) -> None:
    model = graphcap.compile(Linear())
    model(rows(3))
    gone = weakref.ref(model)
    graphs.clear()
    gc.collect()
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_instances_do_not_share_graphs(graphs: list[Any]) -> None:
    models = [graphcap.compile(Linear()) for _ in range(10)]  # more than Dynamo's recompile limit
    for model in models:
        assert_same_as_eager(model, rows(3))
    assert len(graphs) == 10


# Compiling again.


def test_compiling_twice_alike_does_nothing(graphs: list[Any]) -> None:
    model = graphcap.compile(Linear(), capture_sizes=[1, 2])
    model(rows(3))
    record = record_of(model)
    graphcap.compile(model, config=graphcap.Config(capture_sizes=(1, 2)))
    model(rows(3))
    assert record_of(model) is record
    assert len(graphs) == 1

    fn = graphcap.compile(lambda x: x + 1)
    assert graphcap.compile(fn) is fn


def test_compiling_differently_replaces(graphs: list[Any]) -> None:
    def step(x: Tensor) -> Tensor:
        return x + 1

    first = graphcap.compile(step)
    second = graphcap.compile(first, cudagraph_mode="none")
    record = record_of(second)
    assert record is not None
    assert record.original is step
    assert record.config.cudagraph_mode is graphcap.CUDAGraphMode.NONE
    assert_same_as_eager(second, rows(3))
    assert len(graphs) == 1


def test_keywords_win_over_config() -> None:
    record = record_of(graphcap.compile(Linear(), config=graphcap.Config(max_plans=3, cache=False), max_plans=5))
    assert record is not None
    assert (record.config.max_plans, record.config.cache) == (5, False)


def test_config_may_be_a_mapping() -> None:
    found = record_of(graphcap.compile(Linear(), config={"max_plans": 3}, compiler="eager"))
    assert found is not None
    assert (found.config.max_plans, found.config.compiler) == (3, "eager")
    with pytest.raises(ConfigError, match=r"config: expected a graphcap\.Config or a mapping of settings, got 'eager'"):
        graphcap.compile(Linear(), config="eager")  # type: ignore[arg-type]


def test_settings_reach_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def recording(gm: torch.fx.GraphModule, inputs: Any, **kwargs: Any) -> Callable[..., Any]:
        seen.append(kwargs)
        return gm.forward

    monkeypatch.setattr(targets, "backend", lambda: recording)
    graphcap.compile(Linear(), capture_sizes=[4])(rows(3))
    graphcap.compile(Linear())(rows(3))
    assert seen == [{"options": {"capture_sizes": [4], "dynamic_arg_dims": {}}}, {"options": {"dynamic_arg_dims": {}}}]


def test_only_declared_dims_reach_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is inferred from annotations is dynamic, and not to be padded."""
    seen = []

    def recording(gm: torch.fx.GraphModule, inputs: Any, options: Any) -> Callable[..., Any]:
        seen.append(options["dynamic_arg_dims"])
        return gm.forward

    monkeypatch.setattr(targets, "backend", lambda: recording)
    graphcap.compile(Linear())(rows(3))
    graphcap.compile(Linear(), dynamic_arg_dims={"x": -2})(rows(3))
    graphcap.compile(Linear(), config=graphcap.Config(dynamic_arg_dims={"x": {0: graphcap.Dim("n", max=8)}}))(rows(3))
    assert seen == [{}, {"x": {-2: "num_tokens"}}, {"x": {0: graphcap.Dim("n", max=8)}}]


def test_a_fill_for_an_argument_that_does_not_exist() -> None:
    with pytest.raises(graphcap.DimError, match=r"pad: .* has no argument 'z'"):
        graphcap.compile(Linear(), dynamic_arg_dims={"x": 0}, pad={"z": 0})


class WithCache(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.kv_cache = torch.zeros(4)

    def forward(self, x: Tensor, slots: Tensor | None = None) -> Tensor:
        return self.fc(x) + self.kv_cache


def test_a_static_argument_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DimError, match=r"static_args: WithCache\.forward has no argument 'slot'; did you mean 'slots'"):
        graphcap.compile(WithCache(), static_args=["slot"])
    with pytest.raises(DimError, match="static_args"):
        graphcap.compile(rows, static_args=["num"])
    graphcap.compile(WithCache(), static_args=["slots", "kv_cache", "step.seq_lens"])
    monkeypatch.setenv("GRAPHCAP_STATIC_ARGS", "kv")  # of all models of the process
    graphcap.compile(WithCache())


def test_records() -> None:
    model = Linear()
    assert record_of(model) is None
    record = record_of(graphcap.compile(model))
    assert record is not None
    assert (record.name, record.kind, record.marking) == ("Linear.forward", "module", "unbacked")
    assert record.original is model
    assert record_of(len) is None


# Eager on request.


@pytest.mark.parametrize("options", [{"enforce_eager": True}, {"compilation_mode": "none"}])
def test_eager_settings_compile_nothing(options: dict[str, Any], graphs: list[Any]) -> None:
    model = graphcap.compile(Linear(), **options)
    x = rows(3)
    assert torch.equal(model(x), model.fc(x))
    assert not graphs


def test_disabled_runs_eager_and_keeps_what_was_compiled(graphs: list[Any]) -> None:
    model, fn = graphcap.compile(Linear()), graphcap.compile(lambda x: x * 2)
    x = rows(3)
    with graphcap.disabled():
        model(x), fn(x)
    assert not graphs
    model(x), fn(x)
    with graphcap.disabled():
        model(rows(5)), fn(rows(5))
    model(rows(5)), fn(rows(5))
    assert len(graphs) == 3  # the function has no declared dims: a second size is a second graph


def test_inside_another_compiled_function_the_module_becomes_part_of_it(graphs: list[Any]) -> None:
    outer_graphs = []

    def outer_backend(gm: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        outer_graphs.append(gm)
        return gm.forward

    inner, fn = graphcap.compile(Linear()), graphcap.compile(lambda x: x * 2)
    inner.register_forward_hook(lambda module, args, output: output + 1)
    outer = torch.compile(lambda x: fn(inner(x)), backend=outer_backend, fullgraph=True)
    x = rows(3)
    torch.testing.assert_close(outer(x), (inner.fc(x) + 1) * 2)
    assert (len(outer_graphs), len(graphs)) == (1, 0)


# Dynamic dims.


def test_one_graph_for_every_size(graphs: list[Any]) -> None:
    model = graphcap.compile(Linear(), dynamic_arg_dims={"x": 0, "y": 0})
    for size in SIZES:
        assert_same_as_eager(model, rows(size), rows(size))
    assert len(graphs) == 1


def test_without_dims_every_size_is_its_own_graph_at_first(graphs: list[Any]) -> None:
    model = graphcap.compile(Linear(), dynamic_arg_dims={})
    for size in (3, 7):
        assert_same_as_eager(model, rows(size))
    assert len(graphs) == 2


def test_a_recompile_for_another_reason_keeps_dims_dynamic(graphs: list[Any]) -> None:
    model = graphcap.compile(Linear())
    for dtype in (torch.float32, torch.float64):
        model.to(dtype)
        for size in SIZES:
            assert_same_as_eager(model, rows(size).to(dtype))
    assert len(graphs) == 2


def test_dims_stay_dynamic_after_dynamo_was_reset(graphs: list[Any]) -> None:
    model = graphcap.compile(Linear())
    model(rows(3))
    torch._dynamo.reset()
    for size in SIZES:
        assert_same_as_eager(model, rows(size))
    assert len(graphs) == 2


def test_dims_of_one_name_are_one_symbol(graphs: list[Any]) -> None:
    def add(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return (x + y).sum() + z.sum()

    compiled = graphcap.compile(add, dynamic_arg_dims={"x": {0: "n"}, "y": {0: "n"}, "z": {0: "m"}})
    for n, m in ((3, 5), (4, 4), (1, 2)):
        assert_same_as_eager(compiled, rows(n), rows(n), rows(m))
    assert len(graphs) == 1
    sizes = [
        node.meta["example_value"].shape[0] for node in graphs[0].graph.nodes if node.name in ("l_x_", "l_y_", "l_z_")
    ]
    x, y, z = (str(size) for size in sizes)
    assert x == y != z


def test_a_disagreement_of_declared_dims_is_an_error(graphs: list[Any]) -> None:
    model = graphcap.compile(Linear(), dynamic_arg_dims={"x": 0, "y": 0})
    with pytest.raises(DimError, match=r"'num_tokens' has different sizes in one call: x\.shape\[0\] = 3"):
        model(rows(3), rows(1))
    model(rows(3), rows(3))
    with pytest.raises(DimError):
        model(rows(3), rows(1))


def test_a_disagreement_of_inferred_dims_is_not(graphs: list[Any]) -> None:
    model = graphcap.compile(Linear())
    for num_rows, num_added in ((3, 3), (3, 1), (5, 1), (4, 4)):
        assert_same_as_eager(model, rows(num_rows), rows(num_added))
    record = record_of(model)
    assert record is not None
    assert "independent" in record.notes[0]


def test_several_and_negative_dims(graphs: list[Any]) -> None:
    def scores(q: Tensor, k: Tensor) -> Tensor:
        return q @ k.transpose(-1, -2)

    compiled = graphcap.compile(scores, dynamic_arg_dims={"q": {0: "b", -2: "s"}, "k": {0: "b", 1: "t"}})
    for b, s, t in ((2, 3, 4), (5, 1, 6), (1, 7, 1)):
        assert_same_as_eager(compiled, torch.randn(b, s, 4), torch.randn(b, t, 4))
    assert len(graphs) == 1


@pytest.mark.parametrize("make", [Batch, lambda x, m: {"ids": x, "mask": m}])
def test_nested_inputs(make: Callable[[Tensor, Tensor], Any], graphs: list[Any]) -> None:
    def masked(batch: Any) -> Tensor:
        ids, mask = (batch.ids, batch.mask) if isinstance(batch, Batch) else (batch["ids"], batch["mask"])
        return ids * mask

    compiled = graphcap.compile(masked, dynamic_arg_dims={"batch": {"ids": 0, "mask": 0}})
    for size in SIZES:
        assert_same_as_eager(compiled, make(rows(size), rows(size)))
    assert len(graphs) == 1


def test_no_mark_stays_on_a_tensor(graphs: list[Any]) -> None:
    model, x = graphcap.compile(Linear()), rows(3)
    model(x)
    assert not vars(x)

    torch._dynamo.mark_static(x, 1)
    mine = dict(vars(x))
    model(x)
    assert vars(x) == mine


def test_no_mark_stays_when_the_call_fails(graphs: list[Any]) -> None:
    def fail(x: Tensor) -> Tensor:
        raise ValueError("mine")

    x = rows(3)
    with pytest.raises(ValueError, match="mine"):
        graphcap.compile(fail)(x)
    assert not vars(x)


# Where one graph for every size is not to be had.


def branch(x: Tensor) -> Tensor:
    return x * 2 if x.shape[0] > 4 else x + 1


def test_a_branch_on_the_size_makes_dims_backed(graphs: list[Any]) -> None:
    compiled = graphcap.compile(branch)
    for size in SIZES:
        assert_same_as_eager(compiled, rows(size))
    record = record_of(compiled)
    assert record is not None
    assert record.marking == "dynamic"
    assert "x > 4" in record.notes[0] or "u0 > 4" in record.notes[0]
    assert len(graphs) == 4  # up to 4, above, 1 and 0
    assert all("shape" not in graph.code for graph in graphs)


def test_fullgraph_survives_a_branch_on_the_size(graphs: list[Any]) -> None:
    compiled = graphcap.compile(branch, fullgraph=True)
    assert_same_as_eager(compiled, rows(3))
    assert_same_as_eager(compiled, rows(6))
    assert len(graphs) == 2


def test_a_size_that_the_code_fixes(graphs: list[Any]) -> None:
    bias = rows(5)
    compiled = graphcap.compile(lambda x: x + bias, dynamic_arg_dims={"x": 0})
    for size in (5, 1, 5):
        assert_same_as_eager(compiled, rows(size))


def test_a_backend_that_cannot_do_without_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    def sizes_please(gm: torch.fx.GraphModule, inputs: Any, **kwargs: Any) -> Callable[..., Any]:
        for value in inputs:
            if isinstance(value, torch.SymInt):
                bool(value > 2)
        return gm.forward

    monkeypatch.setattr(targets, "backend", lambda: sizes_please)
    model = graphcap.compile(Linear())
    for size in SIZES:
        assert_same_as_eager(model, rows(size))
    record = record_of(model)
    assert record is not None
    assert record.marking == "dynamic"


def test_a_break_that_an_unknown_size_makes_in_a_way_of_its_own(
    graphs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hugging Face's Qwen3 on torch 2.11: the trace ended in an error that did not say that a size was unknown, and the
    next one broke the graph in every layer."""
    monkeypatch.setattr(dynamo, "is_data_dependent", lambda error: False)

    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.shape[0] == 4 else x + 1

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x * 3) + 1

    model = graphcap.compile(Outer())
    for size in (3, 5, 7):
        x = rows(size)
        torch.testing.assert_close(model(x), x * 3 + 2)
    assert len(graphs) == 1
    record = record_of(model)
    assert record is not None
    assert record.marking == "dynamic"


def test_a_graph_break_is_allowed_and_effects_happen_once(graphs: list[Any]) -> None:
    log: list[int] = []

    @torch._dynamo.disable
    def note(size: int) -> None:
        log.append(size)

    def noisy(x: Tensor) -> Tensor:
        x = x * 2
        note(x.shape[0])
        return x + 1

    compiled = graphcap.compile(noisy)
    for size in (3, 7):
        x = rows(size)
        torch.testing.assert_close(compiled(x), x * 2 + 1)
    assert log == [3, 7]
    record = record_of(compiled)
    assert record is not None
    assert record.marking == "unbacked"


def test_fullgraph_refuses_a_graph_break(graphs: list[Any]) -> None:
    def noisy(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x + 1

    with pytest.raises(torch._dynamo.exc.Unsupported):
        graphcap.compile(noisy, fullgraph=True)(rows(3))


def test_an_error_in_the_body_is_raised_once(graphs: list[Any]) -> None:
    calls = []

    @torch._dynamo.disable
    def fail() -> None:
        calls.append(1)
        raise ValueError("mine")

    def body(x: Tensor) -> Tensor:
        x = x + 1
        fail()
        return x

    compiled = graphcap.compile(body)
    with pytest.raises(ValueError, match="mine"):
        compiled(rows(3))
    assert calls == [1]


@pytest.mark.parametrize("fullgraph", [False, True])
def test_what_the_graph_calls_is_compiled_on_its_own_terms(fullgraph: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first trace that insists on one graph does not insist on it for others, and no body runs twice."""
    ran = []

    @torch.compile(backend="eager", fullgraph=fullgraph)
    def inner(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x + 1

    def calls_inner(gm: torch.fx.GraphModule, inputs: Any, **kwargs: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            ran.append(1)
            return [inner(out) for out in gm.forward(*args)]

        return run

    monkeypatch.setattr(targets, "backend", lambda: calls_inner)
    x = rows(3)
    double = graphcap.compile(lambda x: x * 2, dynamic_arg_dims={"x": 0})
    if fullgraph:
        with pytest.raises(torch._dynamo.exc.Unsupported):
            double(x)
    else:
        torch.testing.assert_close(double(x), x * 2 + 1)
    assert ran == [1]


def test_our_own_errors_arrive_bare(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(gm: torch.fx.GraphModule, inputs: Any, **kwargs: Any) -> Callable[..., Any]:
        raise RecompileError("a second trace")

    monkeypatch.setattr(targets, "backend", lambda: refuse)
    with pytest.raises(RecompileError, match="a second trace"):
        graphcap.compile(Linear())(rows(3))


def test_threads(graphs: list[Any]) -> None:
    model, results = graphcap.compile(Linear()), {}

    def run(size: int) -> None:
        with torch.no_grad():
            x = rows(size)
            results[size] = torch.equal(model(x), model.fc(x)) and not vars(x)

    threads = [threading.Thread(target=run, args=(size,)) for size in (3, 5, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {3: True, 5: True, 7: True}
    num_graphs = len(graphs)  # Dynamo traces once per thread where several meet a new function at once
    model(rows(9))
    assert len(graphs) == num_graphs


def test_the_real_backend() -> None:
    model = graphcap.compile(Linear(), compiler="eager")
    for size in SIZES:
        x = rows(size)
        assert_same_as_eager(model, x, rows(size))
    record = record_of(model)
    assert record is not None
    assert record.marking == "unbacked"
