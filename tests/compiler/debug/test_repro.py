"""A piece's ``repro.py``: the source computes what the piece computes, and the program runs on its own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx

from graphcap.compiler import nodes
from graphcap.compiler.debug.compare import _report, difference, main, tensor
from graphcap.compiler.debug.graph_source import NotReproducible
from graphcap.compiler.debug.repro import repro_source
from graphcap.compiler.split import Piece
from graphcap.config import Config
from tests.compiler.graphs import in_backend, pieces_of
from tests.compiler.small import Mlp, Stack, compiled, run_python


def program_of(fn: Any, *inputs: Any, piece: int = 0, **options: Any) -> tuple[Piece, dict[str, Any]]:
    """A piece, and the global names of its repro as a module (its ``main`` does not run)."""

    def look(gm: fx.GraphModule, _: Any) -> tuple[Piece, str]:
        found = pieces_of(gm)[piece]
        return found, repro_source("piece", found, Config())

    ((found, source),) = in_backend(look, fn, *inputs, **options)
    names: dict[str, Any] = {"__name__": "repro"}
    exec(compile(source, "repro.py", "exec"), names)
    return found, names


def assert_same_results(found: Piece, names: dict[str, Any]) -> None:
    """Run the piece and its source on the repro's inputs."""
    made = names["make_inputs"]()
    sizes: list[Any] = []
    arguments = iter(made)
    for node in found.module.graph.nodes:
        if node.op == "placeholder":
            scalar = isinstance(nodes.value_of(node), torch.SymInt)
            sizes.append(made[0].size(0) if scalar else next(arguments))
    expected = found.module(*sizes)
    actual = names["call"](names[found.name](), *made)
    assert len(expected) == len(actual)
    for left, right in zip(expected, actual, strict=True):
        torch.testing.assert_close(left, right)


def test_the_source_computes_what_the_piece_computes() -> None:
    found, names = program_of(Stack(1), torch.randn(3, 8))
    assert_same_results(found, names)
    assert [tuple(t.shape) for t in names["make_inputs"]()] == [(3, 8), (24, 8)]


def test_a_dynamic_size_is_read_off_a_tensor() -> None:
    x = torch.randn(5, 4)
    torch._dynamo.mark_dynamic(x, 0)
    found, names = program_of(lambda x: x.reshape(x.size(0) * 2, 2).sum(0), x)
    assert [tuple(t.shape) for t in names["make_inputs"]()] == [(5, 4)]
    assert_same_results(found, names)
    (result,) = names["call"](names["piece_0"](), torch.ones(7, 4))  # another size goes through the same program
    assert result.tolist() == [14.0, 14.0]


def test_strides_and_dtypes_are_kept() -> None:
    x = torch.randn(6, 4).to(torch.bfloat16).t()
    _, names = program_of(lambda x: x + 1, x)
    (made,) = names["make_inputs"]()
    assert (made.shape, made.stride(), made.dtype) == (x.shape, x.stride(), torch.bfloat16)


def test_indices_are_in_range() -> None:
    found, names = program_of(F.embedding, torch.tensor([7, 3]), torch.randn(9, 2))
    assert_same_results(found, names)


def sizes_across_a_cut(x: Tensor) -> Tensor:
    h = x.sin()
    size, q = h.size(), h.reshape(2, 3, -1, 8)
    return F.scaled_dot_product_attention(q, q, q).reshape(size) + 1


def test_a_size_that_crosses_a_cut_is_its_ints() -> None:
    x = torch.randn(6, 8)
    torch._dynamo.mark_dynamic(x, 0)
    _, names = program_of(sizes_across_a_cut, x, piece=2)
    (result,) = names["call"](names["piece_2"](), *names["make_inputs"]())
    assert result.shape == (6, 8)


def scattered_back(x: Tensor, perm: Tensor) -> Tensor:
    inverse = torch.empty_like(perm)
    inverse[perm] = torch.arange(5)
    return x[inverse]


def test_where_something_is_written_by_index_the_indices_are_distinct() -> None:
    found, names = program_of(scattered_back, torch.randn(5), torch.randperm(5))
    assert_same_results(found, names)
    for _ in range(4):
        (perm,) = [each for each in names["make_inputs"]() if each.dtype == torch.int64]
        assert sorted(perm.tolist()) == [0, 1, 2, 3, 4]


def test_an_index_out_of_range_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["repro.py"])

    def call(_piece: Any, x: Tensor, index: Tensor) -> tuple[Tensor]:
        return (x[index + 7],)

    def make_inputs() -> list[Tensor]:
        return [torch.randn(3), torch.tensor([0, 1])]

    status = main(torch.nn.Module(), call, make_inputs, dynamic={}, options={}, autocast={})
    assert status == 2
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1
    assert said[0].startswith("nothing was compared: an integer input is no index here (index 7 is out of bounds")


def test_a_piece_without_tensors_has_no_repro(tmp_path: Path) -> None:
    class Counts(torch.nn.Module):
        def forward(self, x: Tensor, n: int) -> tuple[Tensor, int]:
            return x.relu() + 1, n + 1

    model = compiled(Counts(), debug_dir=str(tmp_path), compiler="eager", dynamic=True)
    with torch.no_grad():
        model(torch.randn(3), 7)
    (folder,) = tmp_path.iterdir()
    files = sorted(path.name for path in (folder / "pieces").iterdir())
    assert files == ["piece_0.py", "piece_0.repro.py", "piece_1.py"]


def test_special_floats_and_devices_import_what_they_need() -> None:
    def masked(x: Tensor) -> Tensor:
        return torch.full((2, 2), float("-inf"), device=x.device).triu(1) + x

    found, names = program_of(masked, torch.randn(2, 2))
    assert_same_results(found, names)


def test_a_function_without_a_module_cannot_be_written() -> None:
    def local(x: Tensor) -> Tensor:
        return x + 1

    allowed = torch._dynamo.allow_in_graph(local)
    with pytest.raises(Exception, match="no module exports") as caught:
        program_of(lambda x: allowed(x) * 2, torch.randn(2))
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), NotReproducible)


def test_a_repro_runs_on_its_own_and_agrees(tmp_path: Path) -> None:
    model = compiled(Mlp(), debug_dir=str(tmp_path), compiler="eager")
    x = torch.randn(5, 4)
    torch._dynamo.mark_dynamic(x, 0)
    with torch.no_grad():
        model(x)
    (folder,) = tmp_path.iterdir()
    done = run_python(str(folder / "pieces" / "piece_0.repro.py"))
    # What torch says without Triton, or without a GPU, is nothing to us.
    said = [line for line in done.stderr.splitlines() if not re.search("triton not found|No CUDA runtime", line)]
    assert (done.returncode, said) == (0, [])
    assert "output 0" in done.stdout
    assert done.stdout.endswith("agrees\n")


@torch.library.custom_op("graphcap_test::opaque", mutates_args=())
def opaque(x: Tensor) -> Tensor:
    return x + 1


@opaque.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_a_custom_op_must_be_registered_first(tmp_path: Path) -> None:
    model = compiled(torch.nn.Sequential(Calls()), debug_dir=str(tmp_path))
    with torch.no_grad():
        model(torch.randn(3))
    (folder,) = tmp_path.iterdir()
    done = run_python(str(folder / "pieces" / "piece_0.repro.py"))
    assert done.returncode == 1
    assert "graphcap_test::opaque is not registered" in done.stderr


class Calls(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return opaque(x)


def test_a_wrong_result_is_far(capsys: pytest.CaptureFixture[str]) -> None:
    eager = torch.tensor([1.0, 2.0])
    assert _report({"output 0": eager}, {"output 0": eager + 1e-7}, None) == 0
    assert _report({"output 0": eager}, {"output 0": eager + 1e-2}, None) == 1
    assert "FAR" in capsys.readouterr().out


def test_what_counts_as_a_difference() -> None:
    nan, one = float("nan"), torch.ones(2)
    assert difference(torch.tensor([nan, 1.0]), torch.tensor([nan, 1.0])) == (0.0, 0.0)
    assert difference(torch.tensor([nan, 1.0]), one)[0] == float("inf")
    assert difference(one, torch.tensor([float("inf"), 1.0]))[0] == float("inf")
    assert difference(one, one.double())[0] == float("inf")
    assert difference(torch.tensor([1, 2]), torch.tensor([1, 3])) == (1.0, 0.5)
    assert difference(torch.zeros(2), one)[1] == float("inf")


@given(
    shape=st.lists(st.integers(0, 4), max_size=3),
    order=st.randoms(use_true_random=False),
    offset=st.integers(0, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64]),
)
def test_random_tensors_have_the_recorded_layout(shape: list[int], order: Any, offset: int, dtype: torch.dtype) -> None:
    dims = list(range(len(shape)))
    order.shuffle(dims)
    strided = torch.empty([shape[d] for d in dims]).permute([dims.index(d) for d in range(len(shape))])
    made = tensor(shape, strided.stride(), dtype, "cpu", offset)
    assert (list(made.shape), made.stride(), made.storage_offset(), made.dtype) == (
        shape, strided.stride(), offset, dtype,
    )  # fmt: skip
    made.clone()  # its storage holds all of it
