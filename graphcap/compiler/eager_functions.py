"""``@graphcap.eager``: functions that no graph holds, and what a trace does with them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import fx

from graphcap.compiler import private
from graphcap.compiler.breakable import current
from graphcap.compiler.rules import register_op

P = ParamSpec("P")
R = TypeVar("R")


def eager(
    fn: Callable[P, R] | None = None, *, fake: Callable[P, R] | None = None
) -> Callable[P, R] | Callable[[Callable[P, R]], Callable[P, R]]:
    """Mark a function or a custom op so that it always breaks a capture and runs live, as it is, on every call.

    Dynamo does not look inside. It learns the output shapes by calling the function on fake tensors; where the body
    cannot run on those (it reads values, calls a kernel by pointer), give ``fake``, a function of the same arguments
    that returns tensors of the right shapes and dtypes. What it does to Python objects it does in these calls as well:
    a list that it appends to grows when a graph is traced. Tensors that it holds are not written then.

    Args:
        fn: a function of tensors and plain values, or a registered custom op (which is declared ``capture="never"``).
        fake: the shape function.

    Returns:
        The function to call instead, or, used as ``@graphcap.eager(fake=...)``, a decorator.
    """
    if fn is None:
        return functools.partial(eager, fake=fake)  # type: ignore[return-value]
    if isinstance(fn, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)) or hasattr(fn, "_opoverload"):
        register_op(fn, capture="never")
        return fn

    @functools.wraps(fn)
    def live(*args: P.args, **kwargs: P.kwargs) -> R:
        if (mode := private.fake_mode_of([*args, *kwargs.values()])) is not None:
            return fake(*args, **kwargs) if fake is not None else _on_fake_tensors(mode, allowed, args, kwargs)
        if (recording := current.recording()) is not None:
            result: R = recording.live(fn, args, kwargs)
            return result
        return fn(*args, **kwargs)

    # Disabled as well: where the trace has to break at this call, Dynamo must not compile the body on its own.
    allowed: Callable[P, R] = torch._dynamo.allow_in_graph(torch._dynamo.disable(live))
    allowed._graphcap_eager = fn  # type: ignore[attr-defined]
    allowed._graphcap_fake = fake  # type: ignore[attr-defined]
    allowed._graphcap_moves_on = False  # type: ignore[attr-defined]
    return allowed


def _on_fake_tensors(mode: Any, live: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Learn the output shapes. What the function holds (the weights of a module) is real, and stays as it is; a
    compiled model that it calls runs eager, or it would be compiled and captured for tensors without memory."""
    from graphcap.compiler.frontend.disabling import disabled
    from graphcap.compiler.traced_writes import RealTensorsUnwritten

    unwritten = RealTensorsUnwritten(mode)
    try:
        with private.real_tensors_allowed(mode), disabled(), torch.compiler.set_stance("force_eager"), unwritten:
            return live._graphcap_eager(*args, **kwargs)
    finally:
        live._graphcap_moves_on |= unwritten.moves_on


def moves_on(node: fx.Node) -> bool:
    """Whether a node calls an ``@graphcap.eager`` function that was seen to change what it holds from what it holds: a
    counter, a position. Calling it twice is not the same as calling it once."""
    return getattr(node.target, "_graphcap_moves_on", False)
