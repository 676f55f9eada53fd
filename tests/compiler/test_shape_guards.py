"""What Inductor demanded of a size is demanded again of a twin, and of an artifact from the cache."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo import mark_dynamic

from graphcap.compiler import private, region
from graphcap.compiler.backend import graphcap
from graphcap.compiler.eager_functions import eager
from graphcap.compiler.shape_guards import ShapeGuards
from tests.compiler.graphs import in_backend

SMALL, LARGE = 8, 6000
REPOSITORY = Path(__file__).parents[2]


@eager
def live(x: Tensor) -> Tensor:
    return x * 3


def twice_softmax(x: Tensor) -> Tensor:
    """Inductor keeps a softmax in one kernel up to 4096 rows, and says so."""
    return live(torch.softmax(live(torch.softmax(x, 0)), 0))


def run(fn: Any, *sizes: int) -> list[region.Region]:
    """A new process as far as Dynamo and graphcap know, the same cache on disk."""
    torch._dynamo.reset()
    region.forget_regions()
    compiled = torch.compile(fn, backend=graphcap)
    for index, size in enumerate(sizes):
        x = torch.randn(size, 4)
        if index == 0:
            mark_dynamic(x, 0)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), fn(x))
    return region.all_regions()


def origins(each: region.Region) -> list[str]:
    return ["twin" if p.twin_of is not None else p.origin for p in each.pieces if p.kind == "captured"]


@pytest.mark.slow
def test_twin_and_cached_artifact_keep_the_guard() -> None:
    cold = run(twice_softmax, SMALL, 40, LARGE)
    if len(cold) == 1:
        pytest.skip("this torch adds no guard to a softmax")
    assert [origins(each) for each in cold] == [["compiled", "twin"], ["compiled", "twin"]]
    warm = run(twice_softmax, SMALL, 40, LARGE)
    assert [origins(each) for each in warm] == [["cache", "twin"], ["cache", "twin"]]
    assert "4096" in warm[1].recompiled_because


@pytest.mark.slow
def test_a_first_call_beyond_the_guard_compiles_its_own_artifact_once() -> None:
    def softmax(x: Tensor) -> Tensor:
        return torch.softmax(x, 0) + 1

    run(softmax, SMALL)
    (beyond,) = run(softmax, LARGE)
    assert origins(beyond) == ["compiled"]
    (again,) = run(softmax, LARGE)
    assert origins(again) == ["cache"]
    (small,) = run(softmax, SMALL)
    assert origins(small) == ["cache"]


def in_trace(look: Any, *shape: int) -> Any:
    x = torch.randn(shape)
    mark_dynamic(x, 0)
    mark_dynamic(x, 1)

    def wrapped(gm: fx.GraphModule, _: Any) -> Any:
        value = next(n.meta["example_value"] for n in gm.graph.nodes if isinstance(n.meta.get("example_value"), Tensor))
        return look(private.fake_mode_of([value]), *(size.node.expr for size in value.shape))

    (result,) = in_backend(wrapped, lambda x: x + 1, x)
    return result


def test_only_new_guards_about_own_symbols_are_kept() -> None:
    def look(mode: Any, a: Any, b: Any) -> ShapeGuards:
        private.add_shape_guard(mode, a < 1000)
        before = private.shape_guards(mode)
        private.add_shape_guard(mode, a * 3 < 500)
        private.add_shape_guard(mode, b < 70)
        private.add_shape_guard(mode, a * b < 9000)
        return ShapeGuards.added_since(before, mode, [a])

    guards = in_trace(look, 4, 6)
    assert len(guards.expressions) == 1
    assert "500" in str(guards) or "166" in str(guards)


def test_guards_are_asked_of_the_other_symbols() -> None:
    def look(mode: Any, a: Any, b: Any) -> tuple[bool, bool, int]:
        guards = ShapeGuards((a < 5,), (a,))
        before = len(private.shape_guards(mode))
        return guards.hold_for([a], mode), guards.hold_for([b], mode), len(private.shape_guards(mode)) - before

    holds, fails, added = in_trace(look, 4, 6)
    assert holds
    assert not fails
    assert added == 2, "Dynamo must watch what was asked"


def test_no_guards_hold_for_every_piece() -> None:
    assert in_trace(lambda mode, a, b: ShapeGuards().hold_for([a, b], mode), 4, 6)


def test_guards_survive_the_cache() -> None:
    def look(mode: Any, a: Any, b: Any) -> bool:
        guards = ShapeGuards.from_bytes(ShapeGuards((a * 2 < 100,), (a, b)).to_bytes())
        return guards.hold_for([a, b], mode) and guards.expressions[0].free_symbols == {guards.symbols[0]}

    assert in_trace(look, 4, 6)


def test_guards_survive_into_another_process(tmp_path: Path) -> None:
    payload = tmp_path / "guards"
    payload.write_bytes(in_trace(lambda mode, a, b: ShapeGuards((a < 5,), (a, b)).to_bytes(), 4, 6))
    code = (
        "import pathlib, sys; from graphcap.compiler.shape_guards import ShapeGuards; "
        "guards = ShapeGuards.from_bytes(pathlib.Path(sys.argv[1]).read_bytes()); "
        "print(guards.expressions[0].free_symbols == {guards.symbols[0]})"
    )
    command = [sys.executable, "-c", code, str(payload)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
