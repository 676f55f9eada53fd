"""``@support_graph_compile``: a class whose instances compile themselves at their first call.

The class stays the object it was. All that it gains is a class attribute in the place where ``nn.Module.__call__``
looks for a compiled version of itself; at the first call it compiles the instance in place, as
:func:`graphcap.compile` does, and the instance's own attribute hides it from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import FunctionType, MethodType
from typing import Any, TypeVar, cast, overload

from torch import nn
from torch.compiler import is_dynamo_compiling, is_exporting

from graphcap.compiler.frontend.api import COMPILED_CALL, install, module_target
from graphcap.compiler.frontend.call_dims import CallDims
from graphcap.compiler.frontend.dims import parse
from graphcap.compiler.frontend.disabling import disabled, is_disabled
from graphcap.compiler.frontend.request import check_settings, frontend_of, settings_of
from graphcap.compiler.frontend.target import CompiledTarget
from graphcap.config import Config
from graphcap.errors import ConfigError, DimError

__all__ = ["disabled", "support_graph_compile"]

C = TypeVar("C", bound=type[nn.Module])


@overload
def support_graph_compile(cls: C, /) -> C: ...


@overload
def support_graph_compile(
    *,
    dynamic_arg_dims: Mapping[str, Any] | None = None,
    enable_if: Callable[[Any], bool] | None = None,
    fullgraph: bool = False,
    frontend: str = "dynamo",
    config: Config | Mapping[str, Any] | None = None,
    **options: Any,
) -> Callable[[C], C]: ...


def support_graph_compile(
    cls: C | None = None,
    /,
    *,
    dynamic_arg_dims: Mapping[str, Any] | None = None,
    enable_if: Callable[[Any], bool] | None = None,
    fullgraph: bool = False,
    frontend: str = "dynamo",
    config: Config | Mapping[str, Any] | None = None,
    **options: Any,
) -> C | Callable[[C], C]:
    """Class decorator: every instance of this ``nn.Module`` class is compiled at its first call.

    Args:
        cls: the class, where the decorator is used without arguments.
        dynamic_arg_dims: as for :func:`graphcap.compile`. A subclass with a ``forward`` that lacks one of these
            arguments gets its dims from its own annotations.
        enable_if: asked once per instance, at its first call; an instance for which it is false stays eager.
        fullgraph: a graph break is an error.
        frontend: as for :func:`graphcap.compile`.
        config: settings, as a Config or a mapping; overridden by ``options``.
        options: settings by name, see :class:`graphcap.Config`.

    Raises:
        ConfigError: an unknown setting or a bad value.
        DimError: a malformed ``dynamic_arg_dims``, or one that names an argument that ``forward`` does not have.
        TypeError: the class is no ``nn.Module``.

    Subclasses are compiled likewise; where one is decorated too, its own decoration holds. A module called inside a
    compiled one becomes part of the outer graph.

    Example::

        @support_graph_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0}, enable_if=lambda m: m.depth > 2)
        class Decoder(nn.Module): ...
    """
    settings, make = settings_of(config, options), frontend_of(frontend)
    given = Config.resolve(settings)  # a mistake is reported where it was made, not at the first call
    check_settings(frontend, given)
    if enable_if is not None and not callable(enable_if):
        raise ConfigError(f"enable_if: expected a function of the instance, got {enable_if!r}")
    if dynamic_arg_dims is None:
        dynamic_arg_dims = given.dynamic_arg_dims
    if dynamic_arg_dims is not None:
        parse(dynamic_arg_dims)

    def decorate(cls: C) -> C:
        if not _is_module_class(cls):
            raise TypeError(
                f"@support_graph_compile is for nn.Module classes, got {cls!r}; for a function or an instance use "
                "graphcap.compile"
            )
        if dynamic_arg_dims is not None and "forward" in vars(cls):
            CallDims.of(_forward_of(cls), dynamic_arg_dims).require(given.pad, "pad")
        setattr(cls, COMPILED_CALL, _AtFirstCall(cls, dynamic_arg_dims, enable_if, settings, fullgraph, make))
        return cls

    return decorate if cls is None else decorate(cls)


def _is_module_class(given: object) -> bool:
    return isinstance(given, type) and issubclass(given, nn.Module)


def _forward_of(cls: type[nn.Module]) -> Callable[..., Any]:
    """``forward`` with the arguments that a caller gives: without ``self``, before there is an instance."""
    return MethodType(cls.forward, cls) if isinstance(vars(cls)["forward"], FunctionType) else cls.forward


class _AtFirstCall:
    """The class attribute. Not a data descriptor, so that an instance's own attribute comes first."""

    def __init__(
        self,
        decorated: type[nn.Module],
        dynamic_arg_dims: Mapping[str, Any] | None,
        enable_if: Callable[[Any], bool] | None,
        settings: Mapping[str, Any],
        fullgraph: bool,
        make: type[CompiledTarget],
    ) -> None:
        self.decorated = decorated
        self.dynamic_arg_dims = dynamic_arg_dims
        self.enable_if = enable_if
        self.settings = settings
        self.fullgraph = fullgraph
        self.make = make

    def __get__(self, module: nn.Module | None, owner: type[nn.Module]) -> Callable[..., Any] | None:
        """The compiled call of an instance that is being called for the first time; ``None`` runs it as it is."""
        if module is None or is_dynamo_compiling() or is_exporting() or is_disabled.get():
            return None
        if self.enable_if is not None and not self.enable_if(module):
            object.__setattr__(module, COMPILED_CALL, None)
            return None
        install(module, module_target(module, self._dims_of(module), self.settings, self.fullgraph, self.make))
        return cast(Callable[..., Any], vars(module)[COMPILED_CALL])

    def _dims_of(self, module: nn.Module) -> CallDims:
        try:
            return CallDims.of(module.forward, self.dynamic_arg_dims)
        except DimError:
            if type(module).forward is self.decorated.forward:
                raise
            return CallDims.of(module.forward, None)  # a subclass with other arguments
