"""What Dynamo is given to trace: per compiled target one Python function with a code object of its own.

Dynamo keeps graphs, recompile limits and guard failures per code object. ``nn.Module.compile()`` gives it the same one
for every module of a process, so the ninth model would hit the recompile limit of the first eight.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, cast

import torch
from torch import nn

_TORCH = Path(torch.__file__).parent
_serial = itertools.count()

_POSITIONAL = re.compile(r"L\['args'\]\[(?P<index>\d+)\]")
_KEYWORD = re.compile(r"L\['kwargs'\]\['(?P<name>\w+)'\]")


def module_entry(cls: type[nn.Module]) -> FunctionType:
    """A function of a module and its arguments that does what ``module(...)`` does, hooks included."""

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self._call_impl(*args, **kwargs)

    entry = cast(FunctionType, call)
    return _own_code(entry, f"{cls.__name__}_forward", f"{cls.__qualname__}.forward", _source(cls.forward, entry))


def function_entry(fn: FunctionType) -> FunctionType:
    """A function that does what ``fn`` does."""
    # Dynamo skips the frames of decorators such as torch.no_grad(), and with them their code: those are called.
    entry = fn if not hasattr(fn, "__wrapped__") else _calling(fn)
    return _own_code(entry, fn.__name__, fn.__qualname__, _source(fn, entry))


def parameter_source(source: str, fn: Callable[..., Any]) -> str:
    """Name an argument after its parameter where the traced frame takes ``*args, **kwargs``.

    That is so for :func:`module_entry` and for ``nn.Module.compile()``.

    Args:
        source: Dynamo's name for an input: ``"L['args'][1]"``, ``"L['kwargs']['x']"``, or anything else.
        fn: the function that gets the arguments, without ``self``: ``module.forward``.

    Returns:
        ``"L['positions']"``; ``source`` where it is something else, or the parameter is a ``*args`` itself.
    """
    if (keyword := _KEYWORD.match(source)) is not None:
        return f"L['{keyword['name']}']{source[keyword.end() :]}"
    if (positional := _POSITIONAL.match(source)) is not None:
        parameters = [p for p in inspect.signature(fn).parameters.values() if p.kind is not p.VAR_KEYWORD]
        index = int(positional["index"])
        if index < len(parameters) and all(p.kind is not p.VAR_POSITIONAL for p in parameters[: index + 1]):
            return f"L['{parameters[index].name}']{source[positional.end() :]}"
    return source


def _calling(fn: FunctionType) -> FunctionType:
    def call(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    return cast(FunctionType, call)


def _source(fn: Callable[..., Any], otherwise: FunctionType) -> CodeType:
    """The code that a user wrote for ``fn``, whatever decorators are around it.

    Not torch's own, as for an ``nn.Sequential``: what seems to be written there Dynamo puts into a wrapper, which is
    the same code for all of them and has other names for the arguments.
    """
    written = inspect.unwrap(fn)
    if isinstance(written, FunctionType) and not Path(written.__code__.co_filename).is_relative_to(_TORCH):
        return written.__code__
    return otherwise.__code__


def _own_code(fn: FunctionType, name: str, qualname: str, source: CodeType) -> FunctionType:
    """A copy of ``fn`` whose code object equals no other, and that says it was written where ``source`` was."""
    code = fn.__code__.replace(
        co_name=name,
        co_qualname=qualname,
        co_filename=source.co_filename,
        co_firstlineno=source.co_firstlineno,
        co_consts=(*fn.__code__.co_consts, f"graphcap target {next(_serial)}"),
    )
    copy = FunctionType(code, fn.__globals__, name, fn.__defaults__, fn.__closure__)
    copy.__kwdefaults__ = fn.__kwdefaults__
    copy.__qualname__ = qualname
    copy.__module__ = fn.__module__
    return copy
