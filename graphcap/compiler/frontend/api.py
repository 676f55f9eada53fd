"""``graphcap.compile``: compile a module in place, or get a compiled function for a function or bound method."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import FunctionType, MethodType
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling, is_exporting

from graphcap.compiler.frontend.call_dims import CallDims
from graphcap.compiler.frontend.disabling import is_disabled
from graphcap.compiler.frontend.entry import function_entry, module_entry
from graphcap.compiler.frontend.request import check_settings, frontend_of, settings_of, static_args_of_call
from graphcap.compiler.frontend.target import CompiledTarget
from graphcap.config import Config

T = TypeVar("T", bound=Callable[..., Any])

#: Where ``nn.Module.__call__`` looks for a compiled version of itself, as ``nn.Module.compile()`` sets it.
COMPILED_CALL = "_compiled_call_impl"
#: Where a compiled callable keeps its :class:`CompiledTarget`.
_TARGET = "_graphcap_target"


def compile(
    target: T,
    *,
    dynamic_arg_dims: Mapping[str, Any] | None = None,
    fullgraph: bool = False,
    frontend: str = "dynamo",
    config: Config | Mapping[str, Any] | None = None,
    **options: Any,
) -> T:
    """Compile ``target`` with graphcap; tracing happens at its first call.

    Args:
        target: an ``nn.Module``, compiled in place and returned; or a function or bound method, for which a compiled
            one is returned.
        dynamic_arg_dims: which dims of which arguments change between calls: ``{"input_ids": 0, "x": -1,
            "hidden": {0: "num_tokens"}, "positions": [0, 1], "batch.ids": 0}``. Dims of one name have one size; an
            int is named ``"num_tokens"``; ``"num_reqs+1"`` follows ``"num_reqs"``; a :class:`graphcap.Dim` may have a
            ``max``. Only dims declared here are ever padded. Without it, dim 0 of every argument annotated as a tensor
            is dynamic.
        fullgraph: a graph break is an error.
        frontend: what looks at the function. ``"dynamo"`` traces it; ``"breakable"`` records its operators while it
            runs, for functions that Dynamo cannot trace (see :mod:`graphcap.compiler.breakable`).
        config: settings, as a Config or a mapping; overridden by ``options``.
        options: settings by name, see :class:`graphcap.Config`.

    Raises:
        ConfigError: an unknown setting or a bad value.
        DimError: a malformed ``dynamic_arg_dims``; or it, ``pad`` or ``static_args`` names an argument that ``target``
            does not have.
        TypeError: ``target`` is something else.

    A second compilation with equal arguments does nothing; with others it replaces the first.

    Example::

        model = graphcap.compile(model, dynamic_arg_dims={"input_ids": 0, "positions": 0}, capture_sizes=[1, 2, 4])
    """
    existing = record_of(target)
    original = target if existing is None else existing.original
    kind = frontend_of(frontend)
    settings = settings_of(config, options)
    declared = settings.get("dynamic_arg_dims") if dynamic_arg_dims is None else dynamic_arg_dims
    wanted = _target_of(original, declared, settings, fullgraph, kind)
    wanted.dims.require(wanted.config.pad, "pad")
    wanted.dims.require(static_args_of_call(original, wanted.config), "static_args")
    check_settings(frontend, wanted.config)
    if existing is not None and existing.same_request(wanted):
        return target
    if isinstance(target, nn.Module):
        install(target, wanted)
        return target
    return cast(T, _function_call(wanted))


def record_of(obj: object) -> CompiledTarget | None:
    """What is known about a compiled module, function or method; ``None`` for anything that we did not compile.

    An instance of a decorated class is compiled at its first call, and unknown before.
    """
    holder = vars(obj).get(COMPILED_CALL) if isinstance(obj, nn.Module) else obj
    found = getattr(holder, _TARGET, None)
    return found if isinstance(found, CompiledTarget) else None


def target_of(obj: object) -> CompiledTarget | None:
    """:func:`record_of`, where an instance of a decorated class is compiled now if that has not happened yet."""
    if isinstance(obj, nn.Module) and COMPILED_CALL not in vars(obj):
        getattr(obj, COMPILED_CALL, None)
    return record_of(obj)


def module_target(
    module: nn.Module,
    dims: CallDims,
    settings: Mapping[str, Any],
    fullgraph: bool = False,
    make: type[CompiledTarget] = CompiledTarget,
) -> CompiledTarget:
    """A target for ``module(...)``, hooks included."""

    name = f"{type(module).__qualname__}.forward"
    entry = module_entry(type(module))
    return make(module, entry, name=name, kind="module", dims=dims, options=settings, fullgraph=fullgraph)


def install(module: nn.Module, target: CompiledTarget) -> None:
    """Have every ``module(...)`` go through ``target``. Copies and pickles of the module leave it behind."""

    def compiled(*args: Any, **kwargs: Any) -> Any:
        module = target.original
        if is_dynamo_compiling() or is_exporting() or target.is_eager or is_disabled.get():
            return module._call_impl(*args, **kwargs)
        return target.call((module,), args, kwargs)

    setattr(compiled, _TARGET, target)
    object.__setattr__(module, COMPILED_CALL, compiled)


def _function_call(target: CompiledTarget) -> Callable[..., Any]:
    original = target.original
    bound = (original.__self__,) if target.kind == "method" else ()

    @functools.wraps(original)
    def compiled(*args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling() or is_exporting() or target.is_eager or is_disabled.get():
            return original(*args, **kwargs)
        return target.call(bound, args, kwargs)

    setattr(compiled, _TARGET, target)
    return compiled


def _target_of(
    target: Any,
    declared: Mapping[str, Any] | None,
    settings: Mapping[str, Any],
    fullgraph: bool,
    make: type[CompiledTarget],
) -> CompiledTarget:
    if isinstance(target, (torch.jit.ScriptModule, torch._dynamo.OptimizedModule)):
        raise TypeError(f"graphcap.compile: {type(target).__name__} is compiled already; pass the original module")
    if isinstance(target, nn.Module):
        return module_target(target, CallDims.of(target.forward, declared), settings, fullgraph, make)
    if isinstance(target, type):
        raise TypeError(f"graphcap.compile: {target.__name__} is a class; decorate it with @support_graph_compile")
    if not isinstance(target, (FunctionType, MethodType)) and isinstance(type(target).__call__, FunctionType):
        target = target.__call__  # an object whose class makes it callable
    fn = target.__func__ if isinstance(target, MethodType) else target
    if not isinstance(fn, FunctionType):
        raise TypeError(f"graphcap.compile: expected a module, function or bound method, got {target!r}")
    return make(
        target,
        function_entry(fn),
        name=fn.__qualname__,
        kind="method" if isinstance(target, MethodType) else "function",
        dims=CallDims.of(target, declared),
        options=settings,
        fullgraph=fullgraph,
    )
