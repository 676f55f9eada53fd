"""Hooks that are registered after a trace are noticed, whatever was compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcap
from graphcap.compiler.frontend import target as targets
from graphcap.compiler.frontend.hooks import HookWatch, modules_of


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * 2

    def step(self, x: Tensor) -> Tensor:
        return self(x) + 1


MODULE = Twice()


def through_a_global(x: Tensor) -> Tensor:
    return MODULE(x)


def through_a_cell(module: nn.Module) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        return module(x)

    return run


def compiled_in_every_way() -> list[tuple[nn.Module, Any]]:
    modules = [Twice(), Twice(), Twice()]
    originals = [modules[0], modules[1].step, through_a_cell(modules[2]), through_a_global]
    return [*zip(modules, originals, strict=False), (MODULE, through_a_global)]


@pytest.mark.parametrize(("module", "original"), compiled_in_every_way())
def test_a_hook_after_a_trace_fires(module: nn.Module, original: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []
    monkeypatch.setattr(targets, "backend", lambda: lambda gm, inputs, **_: graphs.append(gm) or gm.forward)
    x = torch.randn(3, 4)
    with torch.no_grad():
        compiled = graphcap.compile(original)
        before = [compiled(x) for _ in range(3)][-1]
        for where, hook in ((module, lambda m, a, out: out + 10), (module.inner, lambda m, a, out: out + 20)):
            handle = where.register_forward_hook(hook)
            for _ in range(2):
                torch.testing.assert_close(compiled(x), before + (10 if where is module else 40))
            handle.remove()
            torch.testing.assert_close(compiled(x), before)
        handle = torch.nn.modules.module.register_module_forward_hook(lambda m, a, out: out + 1)
        try:
            torch.testing.assert_close(compiled(x), before + 3)
        finally:
            handle.remove()
        torch.testing.assert_close(compiled(x), before)
        num_graphs = len(graphs)
        nn.Linear(2, 2).register_forward_hook(lambda m, a, out: out)
        compiled(x)
    assert len(graphs) == num_graphs, "somebody else's hook"


def test_a_hook_that_comes_and_goes_is_not_traced_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []
    monkeypatch.setattr(targets, "backend", lambda: lambda gm, inputs, **_: graphs.append(gm) or gm.forward)
    model, x = graphcap.compile(Twice()), torch.randn(3, 4)
    with torch.no_grad():
        plain = model(x)
        for _ in range(5):
            handle = model.inner.register_forward_hook(add_one)
            torch.testing.assert_close(model(x), plain + 2)
            handle.remove()
            torch.testing.assert_close(model(x), plain)
    assert len(graphs) == 3, "without, and once more each with guards for all hooks"


def add_one(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output + 1


def test_a_place_is_guarded_when_every_trace_met_a_hook_there() -> None:
    module = nn.Linear(4, 4)
    watch = HookWatch(lambda: [module])
    handle = module.register_forward_hook(lambda m, a, out: out)
    assert not watch.has_unguarded(), "nothing is traced yet"
    watch.traced()
    handle.remove()
    module.register_forward_hook(lambda m, a, out: out).remove()
    assert not watch.has_unguarded()
    watch.traced()
    module.register_forward_hook(lambda m, a, out: out)
    assert watch.has_unguarded()


def test_the_modules_of_what_may_be_compiled() -> None:
    module = Twice()
    assert list(modules_of(module)) == [module]
    assert list(modules_of(module.step)) == [module]
    assert list(modules_of(through_a_cell(module))) == [module]
    assert list(modules_of(through_a_global)) == [MODULE]
    assert list(modules_of(torch.relu)) == []
