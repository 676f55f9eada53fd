from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from graphcap.passes.sites import describe, module_path, source_line

USER = '  File "/home/user/model.py", line 7, in forward\n    return self.norm(x)\n'
TORCH = f'  File "{torch.__file__}", line 3006, in rms_norm\n    return torch.rms_norm(input)\n'


def node(**meta: Any) -> fx.Node:
    created = fx.Graph().placeholder("x")
    created.meta.update(meta)
    return created


def stack(*paths: str) -> dict[str, tuple[str, type]]:
    return {str(index): (path, torch.nn.Module) for index, path in enumerate(paths)}


def test_the_innermost_frame_outside_torch_is_the_users() -> None:
    assert source_line(node(stack_trace=USER + TORCH)) == "/home/user/model.py:7"
    assert source_line(node(stack_trace=TORCH)) == f"{torch.__file__}:3006"
    assert source_line(node()) is None


@pytest.mark.parametrize(
    ("recorded", "path"),
    [
        ("L['self'].model.layers.3.norm", "model.layers.3.norm"),
        ("L['self'].layers[0].norm", "layers.0.norm"),
        ("L['self']._modules['layers']._modules['0']", "layers.0"),
        ("norm", "norm"),
        ("L['self']", None),
    ],
)
def test_module_paths_read_as_in_the_model(recorded: str, path: str | None) -> None:
    assert module_path(node(nn_module_stack=stack("L['self']", recorded))) == path


def test_a_match_is_described_by_the_best_that_its_nodes_know() -> None:
    line, path = node(stack_trace=USER), node(nn_module_stack=stack("L['self'].norm"))
    assert describe([node(), path, line]) == "/home/user/model.py:7 (norm)"
    assert describe([line]) == "/home/user/model.py:7"
    assert describe([path]) == "norm"
    assert describe([node()]) == "node x"
