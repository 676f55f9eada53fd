"""What a recording cannot repeat is left alone, and the report says where it is."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphcap
from tests.compiler.breakable.like_original import CALLS, Mlp, breakable, num_replays, refused, rows

HERE = "test_refused.py"


def waits(x: Tensor) -> Tensor:
    return x * x.sum().item()


def branches(x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


def lists(x: Tensor) -> Tensor:
    return x + sum(x[0].tolist())


def to_numpy(x: Tensor) -> Tensor:
    return x + float(x.numpy().sum())


def picks(x: Tensor) -> Tensor:
    return x[x > 0]


def finds(x: Tensor) -> Tensor:
    return torch.nonzero(x)


def repeats(x: Tensor) -> Tensor:
    return torch.repeat_interleave(x, (x[:, 0] > 0).long() + 1, dim=0)


def launches(x: Tensor) -> Tensor:
    x.data_ptr()
    return x + 1


def reshapes(x: Tensor) -> Tensor:
    return (x + 1).t_()


def _unseen_copy(x: Tensor) -> Tensor:
    """What a kernel does that asks for addresses in a way that torch does not see."""
    result = torch.empty_like(x)
    source, target = x.untyped_storage(), result.untyped_storage()
    ctypes.memmove(target.data_ptr(), source.data_ptr(), source.nbytes())
    return result


def reads_what_was_written_unseen(x: Tensor) -> Tensor:
    return _unseen_copy(x * 2) + 1


def changes_what_was_written_unseen(x: Tensor) -> Tensor:
    return _unseen_copy(x * 2).add_(1)


def returns_what_was_written_unseen(x: Tensor) -> Tensor:
    return _unseen_copy(x * 2).view(-1)


def fills(x: Tensor) -> Tensor:
    filled, scaled = torch.empty_like(x).fill_(2.0), x.new_empty(x.shape)
    torch.mul(x, filled, out=scaled)
    scaled[:, 1:].neg_()
    part = torch.empty_like(x)
    part[0], part[1:] = x[0], scaled[1:]
    return part + torch.empty(x.shape[0], 0).sum(-1, keepdim=True)


def scales_nothing(x: Tensor) -> Tensor:
    """As attention in diffusers has it."""
    return torch.baddbmm(x.new_empty(1, x.shape[0], x.shape[0]), x[None], x.t()[None], beta=0, alpha=0.5)


@graphcap.eager
def unseen_but_declared(x: Tensor, out: Tensor) -> None:
    out.copy_(_unseen_copy(x * 2))


def writes_in_a_live_function(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    unseen_but_declared(x, out)
    return out + 1


@pytest.mark.parametrize("function", [fills, scales_nothing, writes_in_a_live_function])
def test_memory_that_is_written_before_it_is_read(function: Callable[[Tensor], Tensor]) -> None:
    captured = breakable(function)
    with torch.no_grad():
        for _ in range(CALLS):
            x = rows()
            torch.testing.assert_close(captured(x), function(x), rtol=0, atol=0)
    (region,) = graphcap.explain(captured).regions
    assert not region.bypass
    assert region.replays


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (reads_what_was_written_unseen, "aten::add reads memory that no operator has written"),
        (changes_what_was_written_unseen, "aten::add_ reads memory that no operator has written"),
        (returns_what_was_written_unseen, "the call returns memory that no operator has written"),
    ],
)
def test_a_kernel_that_nobody_sees(function: Callable[[Tensor], Tensor], reason: str) -> None:
    """Its result in a recording is whatever is in the memory: by chance what it left there in another call."""
    captured = breakable(function)
    with torch.no_grad():
        for _ in range(CALLS):
            x = rows()
            torch.testing.assert_close(captured(x), function(x), rtol=0, atol=0)
    assert reason in refused(captured)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (waits, "aten::_local_scalar_dense waits for a value"),
        (branches, "aten::_local_scalar_dense waits for a value"),
        (lists, "Tensor.tolist hands values to Python"),
        (to_numpy, "Tensor.numpy hands its memory to numpy"),
        (picks, "the values that aten::index reads decide the size"),
        (finds, "aten::nonzero waits for a value"),
        (repeats, "the values that aten::repeat_interleave reads decide the size"),
        (launches, "hands its address to a kernel that torch does not know"),
        (reshapes, "aten::t_ changes the form of a tensor in place"),
    ],
)
def test_a_function_that_reads_values(
    function: Callable[[Tensor], Tensor], reason: str, mode: Callable[[], Any]
) -> None:
    captured = breakable(function)
    with mode():
        for _ in range(CALLS):
            x = rows()
            torch.testing.assert_close(captured(x), function(x), rtol=0, atol=0)
    why = refused(captured)
    assert reason in why
    line = function.__code__.co_firstlineno + 1
    assert f"{HERE}:{line}" in why


def test_the_report_shows_the_reason() -> None:
    captured = breakable(waits)
    captured(rows())
    assert "waits for a value" in " ".join(str(graphcap.explain(captured)).split())


def test_a_result_that_needs_grad() -> None:
    model = breakable(Mlp().eval())
    model(rows()).sum().backward()
    assert model.fc.weight.grad is not None
    assert "needs grad" in refused(model)


def test_what_is_counted_in_python_is_left_alone() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.num_calls += 1
            return x + 1

    model = breakable(Counts())
    for _ in range(CALLS):
        model(rows())
    assert model.num_calls == CALLS
    assert "changes num_calls" in refused(model)


def test_what_is_kept_beyond_the_call_is_left_alone() -> None:
    kept: list[Any] = [None]

    class Keeps:
        __slots__ = ("last",)

    hidden = Keeps()

    def in_a_list(x: Tensor) -> Tensor:
        kept[0] = x * 2
        return x + 1

    def where_nobody_looks(x: Tensor) -> Tensor:
        hidden.last = x * 2
        return x + 1

    for function, reason in ((in_a_list, "changes kept.0"), (where_nobody_looks, "is kept beyond the call")):
        captured = breakable(function)
        for _ in range(CALLS):
            x = rows()
            captured(x)
        assert reason in refused(captured)
        torch.testing.assert_close(kept[0] if function is in_a_list else hidden.last, x * 2)


def test_what_differs_from_call_to_call_is_left_alone() -> None:
    numbers = iter(range(1000))

    def scaled(x: Tensor) -> Tensor:
        return x * next(numbers)

    def from_numbers(x: Tensor) -> Tensor:
        return x * torch.tensor([float(next(numbers))] * 4)

    for function in (scaled, from_numbers):
        captured = breakable(function)
        results = [captured(torch.ones(1, 4))[0, 0].item() for _ in range(CALLS)]
        assert results == list(range(int(results[0]), int(results[0]) + CALLS))
        assert "in the next call" in refused(captured)


@pytest.mark.parametrize("argument", [np.ones(3), {1, 2}, (1).__class__.__dict__])
def test_arguments_that_cannot_be_compared(argument: Any) -> None:
    captured = breakable(lambda x, other: x + 1)
    x = rows()
    torch.testing.assert_close(captured(x, argument), x + 1)
    assert "an argument is a" in refused(captured)


def test_results_that_cannot_be_made_again() -> None:
    class Out:
        def __init__(self, value: Tensor) -> None:
            self.value = value

    captured = breakable(lambda x: Out(x + 1))
    x = rows()
    torch.testing.assert_close(captured(x).value, x + 1)
    assert "the result holds a Out" in refused(captured)


def test_errors_of_the_function_are_its_own() -> None:
    def fails(x: Tensor, fail: bool) -> Tensor:
        if fail:
            raise ValueError("mine")
        return x + 1

    captured = breakable(fails)
    x = rows()
    for _ in range(CALLS):
        captured(x, False)
        with pytest.raises(ValueError, match="mine"):
            captured(x, True)
    assert num_replays(captured) >= 2


@pytest.mark.parametrize("where", ["record.Recorder._begin", "record.Recorder._finish", "recordings.steps_of"])
def test_a_fault_of_ours_is_no_error_of_the_model(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("broken")

    monkeypatch.setattr(f"graphcap.compiler.breakable.{where}", broken)
    captured = breakable(lambda x: x + 1)
    for _ in range(CALLS):
        x = rows()
        torch.testing.assert_close(captured(x), x + 1)
    assert "graphcap failed: RuntimeError: broken" in refused(captured)
