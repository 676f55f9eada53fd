"""What a user asks for besides the target: the settings, in either of two forms, and the front end."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from graphcap.compiler.frontend.target import CompiledTarget
from graphcap.compiler.inductor_settings import check_inductor_settings
from graphcap.config import Config
from graphcap.errors import ConfigError


def settings_of(config: Config | Mapping[str, Any] | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """``config=`` and keywords in one; keywords win.

    Raises:
        ConfigError: ``config`` is something else.
    """
    if config is not None and not isinstance(config, (Config, Mapping)):
        raise ConfigError(f"config: expected a graphcap.Config or a mapping of settings, got {config!r}")
    return {**(config.to_dict() if isinstance(config, Config) else config or {}), **options}


def frontend_of(name: str) -> type[CompiledTarget]:
    """What a front end makes of a target.

    Raises:
        ConfigError: there is none of this name.
    """
    if name == "breakable":
        from graphcap.compiler.breakable.target import BreakableTarget

        return BreakableTarget
    if name != "dynamo":
        raise ConfigError(f"frontend={name!r} is not known; use 'dynamo' or 'breakable'")
    return CompiledTarget


def check_settings(frontend: str, config: Config) -> None:
    """Check what a :class:`Config` does not know of itself: the front end, and Inductor's own settings.

    Raises:
        ConfigError: the front end cannot do what the settings demand, or Inductor has no such setting.
    """
    check_inductor_settings(config)
    if frontend == "breakable" and config.require_passes:
        raise ConfigError(
            f"require_passes ({', '.join(config.require_passes)}) cannot be met with frontend='breakable', which "
            "compiles nothing: passes run inside Inductor. Drop one of them"
        )


def static_args_of_call(target: Any, config: Config) -> list[str]:
    """The ``static_args`` that can only be arguments: no attribute of the module, no variable around the function.

    What the environment says is for every model of the process, and need not fit each.
    """
    if config.origin("static_args") != "code":
        return []
    holder = target if isinstance(target, nn.Module) else getattr(target, "__self__", None)
    fn = inspect.unwrap(target.forward if isinstance(target, nn.Module) else target)
    code = getattr(fn, "__code__", None)
    around = {*getattr(fn, "__globals__", ()), *(code.co_freevars if code is not None else ())}
    roots = {name: name.partition(".")[0] for name in config.static_args}
    # An element of *args has a number for a name.
    return [n for n, root in roots.items() if not (hasattr(holder, root) or root in around or root.isdecimal())]
