"""The environment variables ``GRAPHCAP_<FIELD>``: the one place where they are read.

Every setting that has a form as text can be set here: lists are separated by commas, ``none`` stands for ``None`` or an
empty list, a variable set to nothing counts as unset.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from graphcap.errors import ConfigError, nearest
from graphcap.values import BadValue, Kind

PREFIX = "GRAPHCAP_"

#: Variables with our prefix that are no settings of a compilation.
OTHER_VARIABLES = frozenset({"GRAPHCAP_COMMIT"})  # what a bench writes into its results where there is no git

_warned: set[str] = set()


def read_environment(
    environ: Mapping[str, str], kinds: Mapping[str, Kind], aliases: Mapping[str, str]
) -> dict[str, tuple[Any, str]]:
    """Read every ``GRAPHCAP_*`` variable that is set.

    Args:
        environ: usually ``os.environ``.
        kinds: how to read each setting, by its name.
        aliases: accepted second names, each with the name it stands for.

    Returns:
        Setting -> (value, variable it came from).

    Raises:
        ConfigError: a value that the setting cannot take, or a setting given under both of its names. An unknown
            variable is only warned about, once per process: it may belong to another version.
    """
    names = {PREFIX + name.upper(): name for name, kind in kinds.items() if kind.read is not None}
    names |= {PREFIX + alias.upper(): name for alias, name in aliases.items()}
    found: dict[str, tuple[Any, str]] = {}
    for variable, text in sorted(environ.items()):
        if not variable.startswith(PREFIX) or variable in OTHER_VARIABLES or not text.strip():
            continue
        name = names.get(variable)
        if name is None:
            _warn_unknown(variable, names)
            continue
        if name in found:
            raise ConfigError(f"{found[name][1]} and {variable} are two names of one setting: set one of them")
        found[name] = (_read(variable, text.strip(), kinds[name]), variable)
    return found


def _read(variable: str, text: str, kind: Kind) -> Any:
    assert kind.read is not None
    try:
        return kind.accept(kind.read(text))
    except BadValue as bad:
        raise ConfigError(f"environment variable {variable}: {bad}") from None


def _warn_unknown(variable: str, names: Mapping[str, str]) -> None:
    if variable in _warned:
        return
    _warned.add(variable)
    near = nearest(variable.removeprefix(PREFIX), [name.removeprefix(PREFIX) for name in names])
    hint = f"did you mean {PREFIX}{near}?" if near else f"valid are: {', '.join(sorted(names))}"
    warnings.warn(f"{variable} is no setting of graphcap: {hint}", stacklevel=4)
