"""compile_sizes: static code for chosen sizes, symbolic code for the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import mark_dynamic

from graphcap.compiler import backend, region
from graphcap.compiler.backend import graphcap
from graphcap.compiler.eager_functions import eager
from graphcap.compiler.specialise import by_size, example_arguments, position_of, specialisable_symbol
from graphcap.compiler.symbols import analyse_sizes
from tests.compiler.graphs import in_backend, pieces_of

SIZES = (4, 8, 5, 8, 4, 8, 8, 5)


@eager
def live(x: Tensor) -> Tensor:
    return x * 3


def model(x: Tensor) -> Tensor:
    return live(x.sin() + 1).cos() * x.shape[0]


def rows(n: int, width: int = 6) -> Tensor:
    x = torch.randn(n, width)
    mark_dynamic(x, 0)
    return x


def test_by_size_chooses_by_one_argument() -> None:
    run = by_size(lambda n, x: ("general", n, x), {4: lambda n, x: ("four", n, x)}, 0)
    assert run(3, "x") == ("general", 3, "x")
    assert run(4, "x") == ("four", 4, "x")


def test_only_a_single_size_can_be_specialised() -> None:
    def two(a: Tensor, b: Tensor) -> Any:
        return a + 1, b + 1

    (one_size,) = in_backend(lambda gm, _: analyse_sizes(gm.graph), model, rows(4))
    (two_sizes,) = in_backend(lambda gm, _: analyse_sizes(gm.graph), two, rows(4), rows(5))
    assert specialisable_symbol(one_size) in one_size.key
    assert specialisable_symbol(two_sizes) is None


def test_example_arguments_have_the_recorded_strides() -> None:
    def look(gm: torch.fx.GraphModule, _: Any) -> list[Any]:
        sizes = analyse_sizes(gm.graph)
        (symbol,) = sizes.key
        placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        assert placeholders[position_of(symbol, placeholders)].meta["example_value"].node.expr == symbol
        return [example_arguments(piece, symbol, 16) for piece in pieces_of(gm)]

    (examples,) = in_backend(look, lambda x: live(x.t() + 1) * 2, rows(4))
    shapes = [(tuple(t.shape), t.stride()) for t, _size in examples]
    assert shapes == [((16, 6), (6, 1)), ((6, 16), (1, 6)), ((6, 16), (1, 6))]
    assert [size for _, size in examples] == [16] * 3


def test_a_piece_without_the_size_stays_as_it_is() -> None:
    def look(gm: torch.fx.GraphModule, _: Any) -> list[bool]:
        (symbol,) = analyse_sizes(gm.graph).key
        return [example_arguments(piece, symbol, 16) is None for piece in pieces_of(gm)]

    w = torch.randn(6)
    (missing,) = in_backend(look, lambda x, w: live(w + 1) * 2 + x, rows(4), w)
    assert missing == [True, True, False]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"simulate": True, "capture_after": 2}, {"cache": False}], ids=["live", "captured", "uncached"]
)
def test_listed_sizes_run_static_code_and_others_symbolic_code(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[str] = []

    def watched(general: Any, special: Any, position: int) -> Any:
        def watch(name: str, run: Any) -> Any:
            return lambda *args: (served.append(name), run(*args))[1]

        named = {size: watch(f"at {size}", run) for size, run in special.items()}
        return by_size(watch("symbolic", general), named, position)

    monkeypatch.setattr(backend, "by_size", watched)
    region.forget_regions()
    run = torch.compile(model, backend=graphcap, options={"compile_sizes": [8], **options})
    with torch.no_grad():
        for n in SIZES:
            x = rows(n)
            torch.testing.assert_close(run(x), model(x))
    (only,) = region.all_regions()
    assert not only.bypass
    assert served == [f"at {n}" if n == 8 else "symbolic" for n in SIZES]


@pytest.mark.slow
def test_twins_of_a_specialised_size_share_their_artifact() -> None:
    def twins(x: Tensor) -> Tensor:
        for _ in range(3):
            x = live(x.sin() + 1)
        return x

    region.forget_regions()
    run = torch.compile(twins, backend=graphcap, options={"compile_sizes": [8]})
    with torch.no_grad():
        for n in (4, 8):
            x = rows(n)
            torch.testing.assert_close(run(x), twins(x))
    (only,) = region.all_regions()
    assert not only.bypass


def test_without_a_size_in_the_key_the_option_is_ignored_with_a_note() -> None:
    region.forget_regions()
    run = torch.compile(model, backend=graphcap, options={"compile_sizes": [8], "compiler": "eager"})
    with torch.no_grad():
        run(torch.randn(4, 6))
    (only,) = region.all_regions()
    assert only.notes == ["compile_sizes is ignored: it needs one size in the graph key, here are 0"]
