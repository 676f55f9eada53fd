"""ThreadState, in Python and in C++."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

MODES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "dispatch mode": TorchDispatchMode,
    "function mode": TorchFunctionMode,
    "default device": lambda: torch.device("cpu"),
    "DisableTorchFunctionSubclass": torch._C.DisableTorchFunctionSubclass,
    "DisableTorchFunction": torch._C.DisableTorchFunction,
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_shows_on_the_way_in_and_on_the_way_out(checks: ModuleType, mode: str) -> None:
    outside = checks.ThreadState()
    assert outside() is True
    with MODES[mode]():
        assert outside() is False
        inside = checks.ThreadState()
        assert inside() is True
    assert inside() is False
    assert outside() is True


def test_a_transform_and_a_trace_show(checks: ModuleType) -> None:
    outside, found = checks.ThreadState(), []

    def look(x: torch.Tensor) -> torch.Tensor:
        found.append(outside())
        return x * 2

    torch.func.vmap(look)(torch.ones(2))
    torch.jit.trace(look, torch.ones(2), check_trace=False)
    assert set(found) == {False}
    assert outside() is True


def test_another_thread_in_the_same_modes(checks: ModuleType) -> None:
    with torch.no_grad():
        state, found = checks.ThreadState(), []

        def look(grad: bool) -> None:
            with torch.set_grad_enabled(grad):
                found.append(state())

        for grad in (False, True):
            thread = threading.Thread(target=look, args=(grad,))
            thread.start()
            thread.join()
    assert found == [True, False]


def test_takes_no_arguments(checks: ModuleType) -> None:
    with pytest.raises(TypeError):
        checks.ThreadState()(1)
    with pytest.raises(TypeError):
        checks.ThreadState(1)
