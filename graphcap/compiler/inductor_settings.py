"""Whether torch knows what ``inductor_compile_config`` names: asked before a graph is compiled.

Inductor itself refuses an unknown name once for every piece, and each of them would run without it.
"""

from __future__ import annotations

import types
import typing
from typing import Any

from graphcap.compiler import private
from graphcap.config import CompilationMode, Config
from graphcap.errors import ConfigError, nearest

#: What pieces are compiled with in any case, and what to use instead.
_OURS = {
    "post_grad_custom_pre_pass": "its own passes run there; disable_passes switches them off",
    "triton.cudagraphs": "graphcap captures the pieces; cudagraph_mode says how, or that nothing is",
}
_WITHOUT_PIECES = (CompilationMode.NONE, CompilationMode.STOCK_TORCH_COMPILE)


def check_inductor_settings(config: Config) -> None:
    """Check the names, and the types of the values as far as torch tells them.

    Torch is asked only where there is something to check and pieces go through Inductor: its settings take a second to
    import.

    Raises:
        ConfigError: a name that ``torch._inductor.config`` does not have, a value of another type, or one that would
            take away what graphcap does with the pieces itself.
    """
    if not config.inductor_compile_config or config.compiler == "eager":
        return
    known = private.inductor_setting_types()
    for name, value in config.inductor_compile_config.items():
        if name not in known:
            near = nearest(name, known)
            hint = f"did you mean {near!r}?" if near else "torch._inductor.list_options() has all names"
            raise ConfigError(f"inductor_compile_config: torch._inductor.config has no setting {name!r}: {hint}")
        if not _fits(value, known[name]):
            raise ConfigError(f"inductor_compile_config: {name}: expected {_words(known[name])}, got {value!r}")
        if name in _OURS and value and config.compilation_mode not in _WITHOUT_PIECES:
            raise ConfigError(f"inductor_compile_config: {name} is set by graphcap itself: {_OURS[name]}")


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a type. What cannot be told (the elements of a list, a function) fits."""
    if typing.get_origin(kind) is typing.Literal:
        return value in typing.get_args(kind)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in typing.get_args(kind))
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return not isinstance(kind, type) or isinstance(value, kind)


def _words(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {', '.join(map(repr, typing.get_args(kind)))}"
    return kind.__name__ if isinstance(kind, type) else str(kind)
