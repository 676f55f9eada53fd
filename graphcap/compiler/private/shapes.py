"""Symbols, their ranges and the guards on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def symbol_expression(value: object) -> Any:
    """The sympy expression behind a SymInt, SymFloat or SymBool; ``None`` for anything else."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value.node.expr
    return None


def without_replaced_symbols(value: Any) -> Any:
    """A SymInt in the symbols that are left where the trace has found two sizes to be one; anything else as it is.

    Inductor of torch 2.11 gives an input the name that its symbol had before, and uses the other one.
    """
    if not isinstance(value, torch.SymInt):
        return value
    node = value.node
    if getattr(node, "_expr", node.expr) == node.expr:
        return value
    return node.shape_env.create_symintnode(node.expr, hint=node.hint if node.has_hint() else None)


def is_unbacked(symbol: Any) -> bool:
    """Whether a symbol has no example value (``mark_unbacked``, data-dependent sizes)."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    return bool(free_unbacked_symbols(symbol))


def size_hint(size: int | torch.SymInt) -> int:
    """An example value for a size: what the first call had, 64 where the symbol has no example."""
    expression = symbol_expression(size)
    if expression is None or isinstance(size, int):
        return int(size)
    hints = dict.fromkeys(expression.free_symbols, 64)
    shape_env = size.node.shape_env
    backed = getattr(shape_env, "backed_var_to_val", None)
    if backed is None:  # its earlier name; to ask a later torch for it warns
        backed = getattr(shape_env, "var_to_val", {})
    hints.update({s: v for s, v in backed.items() if s in hints})
    return int(expression.subs(hints))


def bound_symbol(fake_mode: Any, symbol: Any, largest: int) -> bool:
    """Tell the shape environment that a symbol never exceeds ``largest``. Returns whether it took it."""
    shape_env = getattr(fake_mode, "shape_env", None)
    known = getattr(shape_env, "var_to_range", {}).get(symbol)
    if shape_env is None or known is None or known.lower > largest:
        return False
    shape_env.constrain_symbol_range(symbol, compiler_min=int(max(known.lower, 0)), compiler_max=largest)
    return True


def symbol_ranges(fake_mode: Any, symbols: Sequence[Any]) -> tuple[str, ...]:
    """The value range of each symbol, as text: part of what a compiled piece was specialised to."""
    shape_env = getattr(fake_mode, "shape_env", None)
    ranges = getattr(shape_env, "var_to_range", {})
    return tuple(str(ranges.get(symbol, "")) for symbol in symbols)


def shape_guards(fake_mode: Any) -> list[Any]:
    """The sympy expressions of all guards that the shape environment holds now."""
    shape_env = getattr(fake_mode, "shape_env", None)
    return [guard.expr for guard in shape_env.guards] if shape_env is not None else []


def add_shape_guard(fake_mode: Any, expression: Any) -> bool:
    """Evaluate a guard at the current sizes and make Dynamo check it on every call. Returns whether it holds now."""
    return bool(fake_mode.shape_env.evaluate_expr(expression))
