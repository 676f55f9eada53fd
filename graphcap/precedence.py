"""Who wins where a setting is given more than once; the first of these does:

1. a *debugging switch* in the environment (:data:`DEBUGGING_SWITCHES`), so that anybody's program can be bisected
   without editing it;
2. code: ``Config(...)``, ``options={...}`` of ``torch.compile``, keywords of ``graphcap.compile``;
3. ``mode=`` of ``torch.compile``;
4. the other environment variables ``GRAPHCAP_<FIELD>``;
5. the default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graphcap.environment import read_environment
from graphcap.errors import ConfigError, did_you_mean
from graphcap.values import Kind

#: Settings whose environment variable beats code.
DEBUGGING_SWITCHES = frozenset(
    {"enforce_eager", "compiler", "cudagraph_mode", "disable_passes", "cache", "verify", "debug_dir"}
)

#: Second names that options= and the environment accept: vLLM's words.
ALIASES = {"cudagraph_capture_sizes": "capture_sizes", "max_cudagraph_capture_size": "max_capture_size"}

_AUTOTUNE = {"inductor_compile_config": {"max_autotune": True, "coordinate_descent_tuning": True}}

#: torch's mode= and what each changes. The first two ask for what graphcap does anyway.
MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "reduce-overhead": {},
    "max-autotune": _AUTOTUNE,
    "max-autotune-no-cudagraphs": {**_AUTOTUNE, "cudagraph_mode": "NONE"},
}


def settle(
    options: Mapping[str, Any], mode: str | None, environ: Mapping[str, str], kinds: Mapping[str, Kind]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Collect the settings of one ``torch.compile`` call.

    Args:
        options: settings given in code, by name or alias; not yet checked.
        mode: torch's ``mode=``, one of :data:`MODES`.
        environ: the environment.
        kinds: every setting and how it is read.

    Returns:
        Setting -> value, and setting -> origin, for every setting that is not left at its default.
    """
    environment = read_environment(environ, kinds, ALIASES)
    from_environment = {name: (value, f"env {variable}") for name, (value, variable) in environment.items()}
    from_mode = {name: (value, "mode") for name, value in _settings_of_mode(mode).items()}
    from_code = {name: (value, "code") for name, value in _settings_of_code(options, kinds).items()}
    switches = {name: pair for name, pair in from_environment.items() if name in DEBUGGING_SWITCHES}

    winners = from_environment | from_mode | from_code | switches
    chosen = {name: value for name, (value, _) in winners.items()}
    origins = {name: origin for name, (_, origin) in winners.items()}
    if "disable_passes" in switches and isinstance(chosen.get("require_passes"), (list, tuple)):
        # Code may require the very pass that is being switched off to bisect: the switch wins there too.
        disabled = chosen["disable_passes"]
        chosen["require_passes"] = [name for name in chosen["require_passes"] if name not in disabled]
    if "compiler" in switches and chosen["compiler"] == "eager" and "require_passes" in chosen:
        # Passes run inside Inductor: with it they are all switched off.
        chosen["require_passes"], origins["require_passes"] = (), origins["compiler"]
    return chosen, origins


def unknown_setting(name: str, kinds: Mapping[str, Kind]) -> ConfigError:
    """The error for a name that is no setting."""
    if name in ALIASES:
        return ConfigError(f"Config spells {name!r} as {ALIASES[name]!r}; the alias is for options= and variables")
    return ConfigError(
        f"graphcap has no setting {name!r}: {did_you_mean(name, [*kinds, *ALIASES])} "
        "(settings of torch._inductor.config go into inductor_compile_config={...})"
    )


def _settings_of_code(options: Any, kinds: Mapping[str, Kind]) -> dict[str, Any]:
    if not isinstance(options, Mapping):
        raise ConfigError(f"options: expected a mapping of settings or a graphcap.Config, got {options!r}")
    settings: dict[str, Any] = {}
    for given, value in options.items():
        if not isinstance(given, str):
            raise ConfigError(f"options: a setting is named by a string, got {given!r}")
        name = ALIASES.get(given, given)
        if name not in kinds:
            raise unknown_setting(given, kinds)
        if name in settings:
            alias = next(alias for alias, target in ALIASES.items() if target == name)
            raise ConfigError(f"{alias!r} is another name of {name!r}: give one of them")
        settings[name] = value
    return settings


def _settings_of_mode(mode: Any) -> dict[str, Any]:
    if mode is None:
        return {}
    if not isinstance(mode, str) or mode not in MODES:
        raise ConfigError(f"graphcap knows no mode={mode!r}: valid are {', '.join(MODES)}")
    return MODES[mode]
