"""Where in the user's program a node came from: ``modeling_llama.py:72 (model.layers.3.input_layernorm)``.

Dynamo records a stack trace and a module stack per node, and AOTAutograd carries both to the post-grad graph.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import fx

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')
_LOCAL = re.compile(r"^L\['[^']*'\]\.?")
_INDEX = re.compile(r"""\[['"]?([^'"\]]+)['"]?\]""")
_TORCH = str(Path(torch.__file__).parent)


def describe(nodes: Iterable[fx.Node]) -> str:
    """One line for a match: the first known source line and the first known module path among ``nodes``.

    Returns:
        ``"norm.py:12 (layers.0.norm)"``, only one half of it where only one is known, or the first node's name.
    """
    nodes = tuple(nodes)
    line = next(filter(None, map(source_line, nodes)), None)
    path = next(filter(None, map(module_path, nodes)), None)
    if line is None:
        return path if path is not None else f"node {nodes[0].name}"
    return f"{line} ({path})" if path is not None else line


def source_line(node: fx.Node) -> str | None:
    """``file:line`` of the innermost frame outside torch, of any frame where there is none; ``None``: unknown."""
    frames = [match.group("file", "line") for match in _FRAME.finditer(node.meta.get("stack_trace") or "")]
    users = [frame for frame in frames if not frame[0].startswith(_TORCH)] or frames
    return f"{users[-1][0]}:{users[-1][1]}" if users else None


def module_path(node: fx.Node) -> str | None:
    """The innermost module's path from the compiled function's root (``"layers.3.norm"``); ``None``: unknown."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    path = str(list(stack.values())[-1][0])
    path = _INDEX.sub(r".\1", _LOCAL.sub("", path)).replace("._modules.", ".").removeprefix("_modules.")
    return path.strip(".") or None
