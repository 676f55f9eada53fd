"""A piece's identity: what it computes and on what kind of inputs, with every name taken out.

Decoder layers are the same piece 32 times. Node names, parameter names, layer indices and symbol names do not matter;
the operations, their constants, how inputs alias each other, and every input's dtype, device, sizes and strides
do. Two pieces with equal text are twins: one artifact serves both.

What is known about sizes (ranges, guards of the trace) belongs to the text too, since Inductor builds on it. Compiling
a piece adds to that knowledge, so the texts of all pieces are taken before the first is compiled.
"""

from __future__ import annotations

import hashlib
import inspect
import secrets
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from graphcap.compiler import nodes, private
from graphcap.compiler.rules import op_name

#: Marks what means nothing to another process.
_PROCESS = secrets.token_hex(8)


def canonical_text(piece: fx.GraphModule) -> str:
    """The piece as text, one line per node, equal for twins and different for everything else."""
    return _Canonical(piece).text()


def canonical_symbols(piece: fx.GraphModule) -> list[Any]:
    """The piece's symbols in the order in which :func:`canonical_text` numbers them: twins agree on the position."""
    canonical = _Canonical(piece)
    canonical.text()
    return list(canonical.symbols)


class _Canonical:
    def __init__(self, piece: fx.GraphModule, outer: _Canonical | None = None) -> None:
        self.piece = piece
        self.number: dict[fx.Node, int] = {}
        self.symbols: dict[Any, str] = outer.symbols if outer else {}
        self.storages: dict[int, int] = outer.storages if outer else {}

    def text(self) -> str:
        """The nodes, and what is known about their sizes."""
        return "\n".join([*self._nodes(), *self._knowledge()])

    def _nodes(self) -> Iterator[str]:
        for index, node in enumerate(self.piece.graph.nodes):
            self.number[node] = index
            value = self._describe(nodes.value_of(node))
            if node.op == "placeholder":
                yield f"%{index} = placeholder : {value}"
            elif node.op == "get_attr":
                yield f"%{index} = attribute {self._attribute(str(node.target))} : {value}"
            else:
                arguments = f"{self._argument(node.args)} {self._argument(dict(node.kwargs))}"
                yield f"%{index} = {node.op} {self._target(node.target)} {arguments} : {value}"

    def _knowledge(self) -> Iterator[str]:
        fake_mode = private.fake_mode_of([nodes.value_of(n) for n in self.piece.graph.nodes])
        yield f"ranges {private.symbol_ranges(fake_mode, list(self.symbols))}"
        own = [g for g in private.shape_guards(fake_mode) if g.free_symbols and g.free_symbols <= self.symbols.keys()]
        yield f"guards {sorted({self._renamed(guard) for guard in own})}"

    def _argument(self, argument: Any) -> str:
        if isinstance(argument, fx.Node):
            return f"%{self.number[argument]}"
        if isinstance(argument, (tuple, list)):
            return f"{type(argument).__name__}[{', '.join(map(self._argument, argument))}]"
        if isinstance(argument, dict):
            return "{" + ", ".join(f"{k}: {self._argument(v)}" for k, v in sorted(argument.items())) + "}"
        if isinstance(argument, slice):
            return f"slice[{self._argument((argument.start, argument.stop, argument.step))}]"
        return f"{type(argument).__name__}:{argument!r}"

    def _describe(self, value: Any) -> str:
        if isinstance(value, torch.Tensor):
            aliases = self.storages.setdefault(private.storage_id(value), len(self.storages))
            facts = [value.dtype, value.device, self._sizes(value.shape), self._sizes(value.stride())]
            facts += [self._size(value.storage_offset()), value.requires_grad, value.layout, f"storage {aliases}"]
            return f"tensor({', '.join(map(str, facts))}{self._subclass(value)})"
        if isinstance(value, (tuple, list)):
            return f"({', '.join(map(self._describe, value))})"
        if private.symbol_expression(value) is not None:
            return f"{type(value).__name__}({self._size(value)})"
        return repr(value) if isinstance(value, (int, float, bool, str, type(None))) else type(value).__name__

    def _subclass(self, tensor: torch.Tensor) -> str:
        """A wrapper subclass (quantised, nested, distributed) is its type, its own constants and the tensors inside."""
        if not private.is_wrapper_subclass(tensor):
            return ""
        names, constants = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        inner = [f"{name}={self._describe(getattr(tensor, name))}" for name in names]
        return f", {type(tensor).__module__}.{type(tensor).__qualname__} {constants!r} {inner}"

    def _sizes(self, sizes: Any) -> str:
        return f"[{', '.join(map(self._size, sizes))}]"

    def _size(self, size: Any) -> str:
        expression = private.symbol_expression(size)
        if expression is None:
            return str(size)
        for symbol in sorted(expression.free_symbols, key=str):
            kind = "u" if private.is_unbacked(symbol) else "z"
            self.symbols.setdefault(symbol, f"{kind}{len(self.symbols)}")
        return self._renamed(expression)

    def _renamed(self, expression: Any) -> str:
        names = {s: type(s)(self.symbols[s], **s.assumptions0) for s in expression.free_symbols}
        return str(expression.xreplace(names))

    def _target(self, target: Any) -> str:
        if _is_user_function(target):  # its source does not say what it closes over: it is like itself only
            return f"{op_name(target)}@{_PROCESS}.{id(target)}"
        overload = getattr(target, "_overloadname", "")
        return f"{op_name(target)}.{overload}" if overload else op_name(target)

    def _attribute(self, name: str) -> str:
        attribute: Any = self.piece
        for part in name.split("."):
            attribute = getattr(attribute, part)
        if isinstance(attribute, fx.GraphModule):
            return f"graph<{'; '.join(_Canonical(attribute, self)._nodes())}>"
        if isinstance(attribute, torch.Tensor):
            digest = hashlib.sha256(_bytes_of(attribute)).hexdigest()
            return f"constant<{attribute.dtype}, {tuple(attribute.shape)}, {attribute.device}, {digest}>"
        return repr(attribute)


def _bytes_of(tensor: torch.Tensor) -> bytes:
    if tensor.numel() == 0:
        return b""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _is_user_function(target: Any) -> bool:
    return inspect.isfunction(target) and not target.__module__.startswith("torch.")
