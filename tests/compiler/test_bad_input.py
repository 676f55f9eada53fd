"""Calls that a compiled model did not expect: each ends in a correct result, or in the error that eager raises."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphcap.compiler import region
from graphcap.compiler.backend import graphcap
from graphcap.compiler.eager_functions import eager
from tests.compiler.like_eager import assert_like_eager

OPTIONS: dict[str, Any] = {"compiler": "eager", "simulate": True, "capture_after": 2}


@eager
def live(x: Tensor) -> Tensor:
    return x * 3


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return live(self.linear(x)) + x


class Steps(nn.Module):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return live(x * self.count) + 1


def compiled(model: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    region.forget_regions()
    return torch.compile(model, backend=graphcap, options={**OPTIONS, **options})


INFERENCE_FIRST = [torch.inference_mode, torch.no_grad]
NO_GRAD_FIRST = [torch.no_grad, torch.inference_mode]


@pytest.mark.parametrize("order", [INFERENCE_FIRST, NO_GRAD_FIRST], ids=["inference first", "no_grad first"])
@pytest.mark.parametrize("model", [Layer, Steps])
def test_inference_mode_and_no_grad_alternate(model: Any, order: list[Any]) -> None:
    """Every second call is in the other mode: static memory must serve both."""
    assert_like_eager(model, lambda i: (torch.randn(4, 6),), calls=10, grad_mode=lambda call: order[call % 2]())


@pytest.mark.parametrize("order", [INFERENCE_FIRST, NO_GRAD_FIRST], ids=["inference first", "no_grad first"])
def test_the_mode_changes_once_after_the_capture(order: list[Any]) -> None:
    assert_like_eager(Layer, lambda i: (torch.randn(4, 6),), calls=8, grad_mode=lambda call: order[call >= 4]())


def test_an_inference_tensor_is_taken_under_no_grad() -> None:
    def inputs(call: int) -> tuple[Tensor]:
        with torch.inference_mode(call % 2 == 0):
            return (torch.randn(4, 6),)

    assert_like_eager(Layer, inputs, calls=10)


@pytest.mark.parametrize(
    "bad",
    [torch.randn(4, 6).double(), torch.randn(4, 7), torch.randn(6, 4), torch.tensor(1.0)],
    ids=["dtype", "width", "transposed", "rank"],
)
def test_a_wrong_tensor_raises_as_in_eager_and_the_next_call_is_right(bad: Tensor) -> None:
    model = Layer()
    run, good = compiled(model), torch.randn(4, 6)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(run(good), model(good), rtol=0, atol=0)
        with pytest.raises(RuntimeError):
            model(bad)
        with pytest.raises(RuntimeError, match=r"linear|dtype"):
            run(bad)
        torch.testing.assert_close(run(good), model(good), rtol=0, atol=0)


def test_a_tensor_on_the_meta_device_leaves_the_next_call_right() -> None:
    model = Layer()
    run, good = compiled(model), torch.randn(4, 6)
    with torch.no_grad():
        run(good)
        with contextlib.suppress(RuntimeError):  # eager mixes devices here or refuses, by torch version
            run(torch.empty(4, 6, device="meta"))
        torch.testing.assert_close(run(good), model(good), rtol=0, atol=0)


def test_not_a_tensor_raises_what_eager_raises() -> None:
    run = compiled(Layer())
    with torch.no_grad(), pytest.raises(TypeError):
        run("text")


@pytest.mark.parametrize("sizes", [(0, 0, 0, 0), (1, 1, 1, 1), (4, 0, 4, 0, 4, 0, 1, 1, 1), (0, 1, 4, 0, 1, 4)])
def test_zero_and_one_rows(sizes: tuple[int, ...]) -> None:
    assert_like_eager(Layer, lambda i: (torch.randn(sizes[i], 6),), calls=len(sizes), replayed=False)


@pytest.mark.parametrize(
    "values", [(1, 2, 3, 4, 3, 4, 3, 4), (2.5, 0.5, 2.5, 1.5, 2.5), ("a", "b", "a", "b"), (True, None, True, None)]
)
def test_a_non_tensor_that_changes(values: tuple[Any, ...]) -> None:
    def model(x: Tensor, what: Any) -> Tensor:
        if isinstance(what, (int, float)):
            return live(x * what) + 1
        return live(x) + (2 if what == "a" else 3)

    assert_like_eager(lambda: model, lambda i: (torch.randn(4, 6), values[i]), calls=len(values), replayed=False)


def test_an_attribute_that_changes() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls = (self.calls + 1) % 2
            return live(x * self.calls) + 1

    assert_like_eager(Scaled, lambda i: (torch.randn(4, 6),), calls=8)


def test_training_is_switched_between_calls() -> None:
    class Mode(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return live(x) + (1 if self.training else 2)

    class Switching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Mode()

        def forward(self, x: Tensor, train: bool) -> Tensor:
            self.inner.train(train)
            return self.inner(x)

    assert_like_eager(Switching, lambda i: (torch.randn(4, 6), i % 3 == 0), calls=9, replayed=False)


def test_host_syncs_inside() -> None:
    def model(x: Tensor) -> Any:
        total = x.sum().item()
        return live(x) + total, x.tolist(), bool((x > 0).any()), x.nonzero()

    assert_like_eager(lambda: model, lambda i: (torch.randn(4, 6),), replayed=False)


def test_host_syncs_inside_one_graph() -> None:
    def model(x: Tensor) -> Any:
        n = x.abs().sum().clamp(1, 3).long().item()
        torch._check(n >= 1)
        torch._check(n <= 3)
        return live(x + 1) * n, x.nonzero() * 2, (x * 2).cos()

    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        assert_like_eager(lambda: model, lambda i: (torch.randn(4, 6),), replayed=False, calls=6)


def test_weights_move_between_calls() -> None:
    class Reloaded(Layer):
        def reload(self) -> None:
            self.load_state_dict({k: v + 1 for k, v in self.state_dict().items()}, assign=True)

    models: list[Reloaded] = []

    def make() -> Reloaded:
        models.append(Reloaded())
        return models[-1]

    def inputs(call: int) -> tuple[Tensor]:
        if call in (3, 5):
            # Called for the eager side first, then for the compiled one.
            model = models.pop(0)
            models.append(model)
            model.reload()
        return (torch.randn(4, 6),)

    assert_like_eager(make, inputs, calls=9)


def test_an_exception_in_a_live_step_reaches_the_caller_and_leaves_the_model_usable() -> None:
    armed = False

    @eager
    def fails(x: Tensor) -> Tensor:
        if armed and type(x) is Tensor:
            raise KeyError("the user's own")
        return x * 2

    def model(x: Tensor) -> Tensor:
        return fails(x.sin()) + 1

    run, x = compiled(model), torch.randn(4, 6)
    with torch.no_grad():
        for _ in range(4):
            run(x)
        armed = True
        with pytest.raises(KeyError, match="the user's own"):
            run(x)
        armed = False
        assert torch.equal(run(x), model(x))


def test_several_instances_share_code_and_never_state() -> None:
    models = [Steps() for _ in range(3)]
    torch._dynamo.reset()
    region.forget_regions()
    runs = [torch.compile(model, backend=graphcap, options=OPTIONS) for model in models]
    expected = [Steps() for _ in range(3)]
    with torch.no_grad():
        for call in range(5):
            for index, (run, eager_model) in enumerate(zip(runs, expected, strict=True)):
                x = torch.full((2, 6), float(call + index))
                assert torch.equal(run(x), eager_model(x))
    assert [int(model.count) for model in models] == [5, 5, 5]


def test_layers_of_one_class_compiled_one_by_one() -> None:
    torch._dynamo.reset()
    layers = [Layer() for _ in range(3)]
    runs = [torch.compile(layer, backend=graphcap, options=OPTIONS) for layer in layers]
    with torch.no_grad():
        for _ in range(5):
            x = torch.randn(4, 6)
            got = expected = x
            for run, layer in zip(runs, layers, strict=True):
                got, expected = run(got), layer(expected)
            assert torch.equal(got, expected)


def test_guard_filter_fn_is_honoured() -> None:
    def drop_all(guards: Any) -> list[bool]:
        return [False for _ in guards]

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = 2.0

        def forward(self, x: Tensor) -> Tensor:
            return live(x * self.scale) + 1

    model = Scaled()
    run, x = compiled(model, guard_filter_fn=drop_all), torch.randn(4, 6)
    with torch.no_grad():
        before = run(x)
        model.scale = 5.0
        assert torch.equal(run(x), before), "the guard on the attribute was asked to go"
    assert len(region.all_regions()) == 1


@pytest.mark.gpu
def test_several_devices_in_one_process() -> None:
    model = {"cpu": Layer(), "cuda": Layer().cuda()}
    torch._dynamo.reset()
    runs = {
        device: torch.compile(each, backend=graphcap, options={"compiler": "eager"}) for device, each in model.items()
    }
    with torch.no_grad():
        for _ in range(6):
            for device, run in runs.items():
                x = torch.randn(4, 6, device=device)
                torch.testing.assert_close(run(x), model[device](x))


@pytest.mark.gpu
def test_a_function_that_uses_both_devices() -> None:
    def model(x: Tensor, y: Tensor) -> Any:
        z = live(x * 2)
        return z.cpu() + y, (z + 1).sin(), y * 2

    assert_like_eager(
        lambda: model, lambda i: (torch.randn(4, 6, device="cuda"), torch.randn(4, 6)), calls=6, tolerance=1e-6
    )


@pytest.mark.gpu
def test_a_tensor_on_the_wrong_device_raises_what_eager_raises() -> None:
    model = Layer().cuda()
    run, good = compiled(model), torch.randn(4, 6, device="cuda")
    with torch.no_grad():
        for _ in range(4):
            run(good)
        with pytest.raises(RuntimeError, match="device"):
            run(good.cpu())
        torch.testing.assert_close(run(good), model(good))
