"""Kernels that share what they read are fused where a size has a hint and no example."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._inductor.graph import GraphLowering
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

import graphcap
from graphcap.compiler.private import fusion_scores


class TwoReaders(torch.nn.Module):
    """Two outputs of one size that share a mask, and nothing else."""

    def forward(self, x: Tensor, y: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        real = (slots >= 0)[:, None]
        return torch.where(real, x.cos(), 0), torch.where(real, y.sin(), 0)


def as_before_2_13(monkeypatch: pytest.MonkeyPatch) -> None:
    """A size with no example is 0 bytes to the scheduler, whatever hint it has."""
    plain = GraphLowering.get_dep_size_hint

    def ignoring(graph, dep, count_bytes=True):  # type: ignore[no-untyped-def]
        try:
            ignored = free_unbacked_symbols(dep.get_numel())
        except (KeyError, NotImplementedError):
            ignored = set()
        return 0 if ignored else plain(graph, dep, count_bytes)

    monkeypatch.setattr(GraphLowering, "get_dep_size_hint", ignoring)


def num_loops(folder: Path) -> int:
    """Of the one kernel file: the loops over rows that Inductor wrote."""
    (code,) = folder.glob("**/*.inductor.py")
    return code.read_text().count("for(int64_t x0=")


@pytest.mark.parametrize("counts", [True, False])
def test_two_readers_of_one_mask_are_one_kernel_where_hints_count(
    counts: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    as_before_2_13(monkeypatch)
    before = GraphLowering.get_dep_size_hint
    monkeypatch.setattr(fusion_scores, "IS_NEEDED", counts)
    dims = {name: {0: "n"} for name in ("x", "y", "slots")}
    model = graphcap.compile(TwoReaders().eval(), dynamic_arg_dims=dims, cache=False, debug_dir=str(tmp_path))
    for rows in (3, 1, 7):
        x, y, slots = torch.randn(rows, 8), torch.randn(rows, 8), torch.randint(-1, 3, (rows,))
        with torch.no_grad():
            found = model(x, y, slots)
        torch.testing.assert_close(found, TwoReaders()(x, y, slots))
    assert GraphLowering.get_dep_size_hint is before
    assert num_loops(tmp_path) == (1 if counts else 2)
