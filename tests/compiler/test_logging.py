"""Logging through the standard module: ``TORCH_LOGS`` shows it, and without it nothing below a warning is printed."""

from __future__ import annotations

import logging

import pytest
import torch

from graphcap.compiler.region import all_regions, forget_regions
from tests.compiler.small import Mlp, compiled, run_python

_PROGRAM = """
import torch
from tests.compiler.small import Mlp, compiled
with torch.no_grad():
    compiled(Mlp())(torch.randn(2, 4))
"""


@pytest.mark.parametrize("first", ["import torch", "import graphcap", "import graphcap.compiler.backend"])
def test_torch_logs_shows_our_lines_in_a_fresh_process(first: str) -> None:
    done = run_python("-c", f"{first}\n{_PROGRAM}", TORCH_LOGS="+graphcap")
    assert done.returncode == 0, done.stderr
    assert "Mlp_0: 1 piece" in done.stderr
    assert "backend.py" in done.stderr


def test_nothing_is_printed_otherwise() -> None:
    done = run_python("-c", _PROGRAM)
    assert (done.returncode, done.stdout) == (0, "")
    assert "graphcap" not in done.stderr
    assert "Mlp" not in done.stderr


def test_reaching_the_recompile_limit_is_a_warning_that_names_the_guard(caplog: pytest.LogCaptureFixture) -> None:
    forget_regions()
    model = compiled(Mlp(), dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=2), torch.no_grad(), caplog.at_level(logging.INFO, "graphcap"):
        model(torch.randn(2, 4))
        assert not [r for r in caplog.records if r.levelno >= logging.WARNING and r.name.startswith("graphcap")]
        model(torch.randn(3, 4))
    (warning,) = [r for r in caplog.records if r.levelno == logging.WARNING and r.name.startswith("graphcap")]
    assert "recompile_limit" in warning.message
    assert "expected 2, actual 3" in warning.message
    assert any("recompile_limit (2) reached" in note for note in all_regions()[-1].notes)


def test_the_newest_graph_says_why_it_did_not_fit() -> None:
    forget_regions()
    model = compiled(Mlp(), dynamic=False)
    with torch.no_grad():
        for rows in (2, 3, 5):
            model(torch.randn(rows, 4))
    assert [r.recompiled_because.partition(" size")[0] for r in all_regions()] == [
        "",
        "0/0: tensor 'x'",
        "0/1: tensor 'x'",
    ]
    assert "expected 3, actual 5" in all_regions()[-1].recompiled_because
