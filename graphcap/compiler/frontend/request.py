"""What a user asks for besides the target: the settings, in either of two forms, and the front end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
