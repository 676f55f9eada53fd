"""What ``inductor_compile_config`` may name, and which values."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import graphcap
from graphcap import Config, ConfigError
from graphcap.compiler.inductor_settings import check_inductor_settings


def check(settings: dict[str, Any], **others: Any) -> None:
    check_inductor_settings(Config(inductor_compile_config=settings, **others))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_autotun": True}, "no setting 'max_autotun': did you mean 'max_autotune'?"),
        ({"max-autotune": True}, "no setting 'max-autotune': did you mean 'max_autotune'?"),
        ({"nope": 1}, "no setting 'nope': torch._inductor.list_options() has all names"),
        ({"triton": {"cudagraphs": False}}, "no setting 'triton'"),
        ({"max_autotune": "x"}, "max_autotune: expected bool, got 'x'"),
        ({"max_autotune": 1}, "max_autotune: expected bool, got 1"),
        ({"cpp.threads": "2"}, "cpp.threads: expected int, got '2'"),
        ({"max_autotune_gemm_search_space": "SOME"}, "expected one of 'DEFAULT', 'EXHAUSTIVE', got 'SOME'"),
        ({"triton.cudagraphs": True}, "triton.cudagraphs is set by graphcap itself: graphcap captures the pieces"),
        ({"post_grad_custom_pre_pass": print}, "post_grad_custom_pre_pass is set by graphcap itself: its own passes"),
    ],
)
def test_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        check(settings)


def test_taken() -> None:
    check({"max_autotune": True, "cpp.threads": 2, "max_autotune_gemm_search_space": "EXHAUSTIVE"})
    check(dict(torch._inductor.config.get_config_copy()))  # the defaults, whatever torch says of their types


@pytest.mark.parametrize("mode", ["NONE", "STOCK_TORCH_COMPILE"])
def test_without_pieces_there_may_be_what_graphcap_sets_for_them(mode: str) -> None:
    check({"triton.cudagraphs": True, "post_grad_custom_pre_pass": print}, compilation_mode=mode)


def test_without_inductor_nothing_is_looked_up() -> None:
    check({"nope": 1}, compiler="eager")


def test_a_mistake_is_reported_where_it_is_made() -> None:
    wrong: dict[str, Any] = {"inductor_compile_config": {"nope": 1}}
    with pytest.raises(ConfigError, match="nope"):
        graphcap.compile(nn.Linear(2, 2), **wrong)
    with pytest.raises(ConfigError, match="nope"):
        graphcap.support_graph_compile(**wrong)
    with torch.no_grad(), pytest.raises(Exception, match="nope") as caught:
        torch.compile(nn.Linear(2, 2), backend="graphcap", options=wrong)(torch.ones(1, 2))
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), ConfigError)
