"""What one node of a Dynamo graph is about: its value, the tensors it reads, and where the user wrote it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

_USER_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')


def value_of(node: fx.Node) -> Any:
    """The fake tensor, SymInt or Python value that Dynamo recorded for a node; ``None`` where it recorded nothing."""
    return node.meta.get("example_value", node.meta.get("val"))


def leaves(value: Any) -> Iterator[Any]:
    """The tensors and scalars inside nested tuples, lists, dicts and slices."""
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, dict):
        yield from leaves(list(value.values()))
    elif isinstance(value, slice):
        yield from leaves((value.start, value.stop, value.step))
    else:
        yield value


def tensors_of(node: fx.Node) -> list[torch.Tensor]:
    """The tensors that a node produces."""
    return [leaf for leaf in leaves(value_of(node)) if isinstance(leaf, torch.Tensor)]


def is_integer(node: fx.Node) -> bool:
    """Whether it produces tensors, and all of them hold integers or bools."""
    tensors = tensors_of(node)
    return bool(tensors) and all(not t.is_floating_point() and not t.is_complex() for t in tensors)


def is_scalar(node: fx.Node) -> bool:
    """Whether a node produces sizes or plain numbers only: no tensor comes out."""
    found = [leaf for leaf in leaves(value_of(node)) if leaf is not None]
    return bool(found) and not any(isinstance(leaf, torch.Tensor) for leaf in found)


def is_pure_scalar(node: fx.Node) -> bool:
    """Arithmetic on sizes that reads no tensor."""
    return node.op == "call_function" and is_scalar(node) and not touches_tensors(node)


def touches_tensors(node: fx.Node) -> bool:
    """Whether it reads a tensor."""
    return any(tensors_of(arg) for arg in node.all_input_nodes)


def changes_form_in_place(node: fx.Node) -> bool:
    """Whether a call gives an existing tensor another shape, stride or storage: ``x.unsqueeze_(0)``, ``x.set_(y)``."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    name = name.partition(".")[0]
    if not node.op.startswith("call_") or not name.endswith("_"):
        return False
    packet = getattr(torch.ops.aten, name, None)  # of any Python object it has "__eq__"
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return False
    return any(torch.Tag.inplace_view in getattr(packet, overload).tags for overload in packet.overloads())


def source_line(node: fx.Node) -> str:
    """``file:line`` of the innermost user frame that made this node, ``""`` when Dynamo recorded none."""
    frames = _USER_FRAME.findall(node.meta.get("stack_trace") or node.stack_trace or "")
    if not frames:
        return ""
    file, line, _function = frames[-1]
    return f"{file}:{line}"


def module_path(node: fx.Node) -> str:
    """The path of the module whose forward made this node: ``"model.layers.3.self_attn"``, ``""`` for the top level."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = next(reversed(stack.values()))[0]
    return readable_source(str(path))


def readable_source(source: str) -> str:
    """Dynamo's ``L['self']._modules['fc']._parameters['weight']`` as a user would say it: ``fc.weight``."""
    name = re.sub(r"\b(_modules|_parameters|_buffers|__dict__)\b", "", source)
    name = re.sub(r"\[['\"]?([^\]'\"]*)['\"]?\]", r".\1", name)
    name = re.sub(r"\.{2,}", ".", name).strip(".")
    for prefix in ("L.self.", "L.", "G.", "self."):
        if name.startswith(prefix) and name != prefix:
            name = name[len(prefix) :]
    for prefix in ("kwargs.", "args."):
        name = name.removeprefix(prefix)
    return "" if name in ("L", "L.self", "self") else name
