"""When graphcap stands aside, and what runs then."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphcap.compiler import bypass, private, region
from graphcap.compiler.backend import graphcap
from graphcap.compiler.bypass import GRAD_MODE, GRAD_MODE_EAGER
from graphcap.compiler.eager_functions import eager
from graphcap.errors import ConfigError, GraphcapError


@eager
def live(x: Tensor) -> Tensor:
    return x * 3


class Model(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.fc = nn.Linear(4, width)

    def forward(self, x: Tensor) -> Tensor:
        return live(self.fc(x)).sin()


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    region.forget_regions()
    monkeypatch.setattr(bypass, "_warned", set())


@pytest.fixture
def no_inductor(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for the slow compile; its calls."""
    calls: list[str] = []

    def recorded(gm: Any, _inputs: Any, patches: dict[str, Any]) -> Any:
        calls.append("inductor")
        return gm.forward

    monkeypatch.setattr(private, "inductor_with_autograd", recorded)
    return calls


def compiled(model: Any, mode: str | None = None, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend=graphcap, mode=mode, options=options or None)


X = torch.linspace(-1, 1, 12).reshape(3, 4)


@pytest.mark.slow
def test_grad_mode_gives_correct_gradients() -> None:
    torch.manual_seed(0)
    model = Model()
    run, x, y = compiled(model), X.clone().requires_grad_(), X.clone().requires_grad_()
    with pytest.warns(UserWarning, match=r"no_grad\(\) or torch.inference_mode\(\)"):
        run(x).sum().backward()
    got = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    model(y).sum().backward()
    expected = [parameter.grad for parameter in model.parameters()]
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(x.grad, y.grad)


def test_grad_mode_is_warned_of_once(no_inductor: list[str]) -> None:
    run = compiled(Model())
    with pytest.warns(UserWarning, match="grad mode") as first:
        run(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(X.double().float())
        run(torch.randn(5, 4))
    assert len([w for w in first if "grad mode" in str(w.message)]) == 1
    assert region.all_regions()[0].bypass == GRAD_MODE


def test_grad_mode_without_inductor_says_that_it_runs_eager(no_inductor: list[str]) -> None:
    with pytest.warns(UserWarning, match="grad mode"):
        compiled(Model(), compiler="eager")(X)
    assert region.all_regions()[0].bypass == GRAD_MODE_EAGER
    assert "eager" in GRAD_MODE_EAGER
    assert not no_inductor


def test_grad_mode_without_anything_that_needs_grad_is_ours(no_inductor: list[str]) -> None:
    run = compiled(lambda x: live(x + 1), compiler="eager")
    run(X)
    assert region.all_regions()[0].bypass == ""
    assert not no_inductor


def test_no_grad_after_grad_mode_is_ours(no_inductor: list[str]) -> None:
    run = compiled(Model(), compiler="eager")
    with pytest.warns(UserWarning, match="grad mode"):
        run(X)
    with torch.no_grad():
        run(X)
    assert [each.bypass for each in region.all_regions()] == [GRAD_MODE_EAGER, ""]


def test_no_grad_inside_a_graph_that_needs_no_grad_is_ours(no_inductor: list[str]) -> None:
    def model(x: Tensor) -> Tensor:
        with torch.no_grad():
            y = x + 1
        return y * 2

    compiled(model, compiler="eager")(X)
    assert [each.bypass for each in region.all_regions()] == [""]


def test_enable_grad_inside_the_graph_is_not_ours(no_inductor: list[str]) -> None:
    def model(x: Tensor, w: Tensor) -> Tensor:
        with torch.enable_grad():
            y = x * w
        return y.detach() + 1

    run, w = compiled(model), torch.ones(4, requires_grad=True)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        run(X, w)
    assert [each.bypass for each in region.all_regions()] == [GRAD_MODE]


@pytest.mark.parametrize("options", [{"enforce_eager": True}, {"compilation_mode": "NONE"}])
def test_eager_modes_run_the_graph_as_it_is(options: dict[str, Any], no_inductor: list[str]) -> None:
    model = Model()
    run = compiled(model, **options)
    with torch.no_grad():
        assert torch.equal(run(X), model(X))
    assert region.all_regions()[0].bypass.startswith(next(iter(options)))
    assert not no_inductor


def test_the_environment_beats_the_code_for_debugging(monkeypatch: pytest.MonkeyPatch, no_inductor: list[str]) -> None:
    monkeypatch.setenv("GRAPHCAP_ENFORCE_EAGER", "1")
    run = compiled(Model(), enforce_eager=False)
    with torch.no_grad():
        run(X)
    assert region.all_regions()[0].bypass == "enforce_eager (env GRAPHCAP_ENFORCE_EAGER)"


def test_stock_torch_compile_is_inductor_on_the_whole_graph(no_inductor: list[str]) -> None:
    model = Model()
    run = compiled(model, compilation_mode="STOCK_TORCH_COMPILE")
    with torch.no_grad():
        torch.testing.assert_close(run(X), model(X))
    assert no_inductor == ["inductor"]
    assert region.all_regions()[0].pieces == []


def test_stock_torch_compile_raises_inductor_s_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise NotImplementedError("no lowering")

    monkeypatch.setattr(private, "inductor_with_autograd", broken)
    run = compiled(Model(), compilation_mode="STOCK_TORCH_COMPILE")
    with torch.no_grad(), pytest.raises(Exception, match="no lowering"):
        run(X)


def test_a_bypass_that_inductor_cannot_compile_runs_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise NotImplementedError("no lowering")

    monkeypatch.setattr(private, "inductor_with_autograd", broken)
    model = Model()
    run = compiled(model)
    with pytest.warns(UserWarning, match="grad mode"):
        assert torch.equal(run(X), model(X))
    assert "no lowering" in region.all_regions()[0].notes[0]


def test_trace_once_traces_once_and_names_the_guard_of_a_second_trace(no_inductor: list[str]) -> None:
    run = compiled(Model(), compilation_mode="DYNAMO_TRACE_ONCE")
    with torch.no_grad():
        run(X)
        run(X + 1)
        with pytest.raises(Exception, match=r"DYNAMO_TRACE_ONCE.*guard failed") as caught:
            run(torch.randn(5, 4))
    message = str(caught.value)
    assert "size" in message
    assert "Model.forward" in message
    assert no_inductor == ["inductor"]


def test_trace_once_counts_every_model_for_itself(no_inductor: list[str]) -> None:
    options = {"compilation_mode": "DYNAMO_TRACE_ONCE"}
    models = [Model(width) for width in (4, 5)]  # one code, two traces
    with torch.no_grad():
        for model in models:
            torch.compile(model, backend=graphcap, options=options)(X)
    assert len(region.all_regions()) == 2


def test_trace_once_lets_a_graph_break_make_its_graphs(no_inductor: list[str]) -> None:
    def model(x: Tensor) -> Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    run = compiled(model, compilation_mode="DYNAMO_TRACE_ONCE")
    with torch.no_grad():
        assert torch.equal(run(X), model(X))
    assert len(region.all_regions()) == 2


def test_a_function_compiled_twice_with_other_settings_is_no_second_trace(no_inductor: list[str]) -> None:
    def model(x: Tensor) -> Tensor:
        return x + 1

    with torch.no_grad():
        torch.compile(model, backend=graphcap, options={"compiler": "eager"})(X)
        torch.compile(model, backend=graphcap, options={"compilation_mode": "DYNAMO_TRACE_ONCE"})(X)
    assert [each.recompiled_because for each in region.all_regions()] == ["", ""]


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_torch_s_modes_are_taken(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHCAP_COMPILER", "eager")
    model = Model()
    torch._dynamo.reset()
    run = torch.compile(model, backend=graphcap, mode=mode)
    with torch.no_grad():
        assert torch.equal(run(X), model(X))
    config = region.all_regions()[0].config
    assert (config.cudagraph_mode.name == "NONE") == (mode == "max-autotune-no-cudagraphs")


def test_another_mode_is_one_clear_error() -> None:
    torch._dynamo.reset()
    run = torch.compile(Model(), backend=graphcap, mode="fastest")
    with torch.no_grad(), pytest.raises(Exception, match="fastest"):
        run(X)


def test_an_unknown_option_names_the_nearest() -> None:
    with torch.no_grad(), pytest.raises(Exception, match=r"capture_size.*did you mean 'capture_sizes'"):
        compiled(Model(), capture_size=[1])(X)


def test_called_directly_the_backend_raises_its_own_errors() -> None:
    from torch.fx import symbolic_trace

    with pytest.raises(ConfigError, match="did you mean"):
        graphcap(symbolic_trace(lambda x: x), [X], options={"compilr": "eager"})
    assert issubclass(ConfigError, GraphcapError)


def test_a_fault_of_ours_hands_the_graph_to_inductor(
    monkeypatch: pytest.MonkeyPatch, no_inductor: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    from graphcap.compiler import backend

    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(backend, "split", broken)
    model = Model()
    run = compiled(model)
    with torch.no_grad(), caplog.at_level("WARNING", logger="graphcap"):
        torch.testing.assert_close(run(X), model(X))
    assert no_inductor == ["inductor"]
    assert region.all_regions()[0].bypass == "graphcap failed: ZeroDivisionError: a bug"
    assert "Inductor takes over" in caplog.text


def test_a_tensor_that_changes_its_form_in_place_is_not_ours(no_inductor: list[str]) -> None:
    def model(x: Tensor) -> Tensor:
        y = live(x + 1)
        y.unsqueeze_(0)
        return y * 2

    run = compiled(model)
    with torch.no_grad():
        assert torch.equal(run(X), model(X))
    assert region.all_regions()[0].bypass.startswith(f"unsqueeze_ changes the form of a tensor in place ({__file__}:")
