"""The environment variables ``GRAPHCAP_<FIELD>``: the one place where they are read.

Every setting that has a form as text can be set here: lists are separated by commas, ``none`` stands for ``None`` or an
empty list, a variable set to nothing counts as unset.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from graphcap.errors import ConfigError, nearest
from graphcap.values import BOOL, BadValue, Kind

PREFIX = "GRAPHCAP_"

#: Whether the checks of a replay may use an extension that is compiled on the user's machine.
NATIVE = "GRAPHCAP_NATIVE"

#: Whether calls of what ``graphcap.compile`` made may go around Dynamo's frame hook, its guards evaluated all the same.
DIRECT_CALL = "GRAPHCAP_DIRECT_CALL"

#: Whether outputs that lie in memory of a plan raise when they are read too late; a ``debug_dir`` asks for it as well.
CHECK_OUTPUTS = "GRAPHCAP_CHECK_OUTPUTS"

#: Variables with our prefix that are no settings of a compilation.
OTHER_VARIABLES = frozenset(
    {
        "GRAPHCAP_COMMIT",  # what a bench writes into its results where there is no git
        NATIVE,
        DIRECT_CALL,
        CHECK_OUTPUTS,
    }
)

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
        ConfigError: a value that the setting cannot take, or a setting given under both of its names. A
            variable that sets nothing is only warned about, once per process: it may belong to another version.
    """
    native_wanted(environ)  # a value that it cannot take is reported here, not in the middle of a capture
    check_outputs_wanted(environ)
    direct_call_wanted(environ)
    names = {PREFIX + name.upper(): name for name, kind in kinds.items() if kind.read is not None}
    names |= {PREFIX + alias.upper(): name for alias, name in aliases.items()}
    found: dict[str, tuple[Any, str]] = {}
    for variable, text in sorted(environ.items()):
        if not variable.startswith(PREFIX) or variable in OTHER_VARIABLES or not text.strip():
            continue
        name = names.get(variable)
        if name is None:
            _warn_unused(variable, names, kinds)
            continue
        if name in found:
            raise ConfigError(f"{found[name][1]} and {variable} are two names of one setting: set one of them")
        found[name] = (_read(variable, text.strip(), kinds[name]), variable)
    return found


def native_wanted(environ: Mapping[str, str]) -> bool:
    """Whether :data:`NATIVE` allows the extension; it does unless it says no.

    Raises:
        ConfigError: for a value that is neither yes nor no.
    """
    text = environ.get(NATIVE, "").strip()
    return bool(_read(NATIVE, text, BOOL)) if text else True


def direct_call_wanted(environ: Mapping[str, str]) -> bool:
    """Whether :data:`DIRECT_CALL` allows direct calls; it does unless it says no.

    Raises:
        ConfigError: for a value that is neither yes nor no.
    """
    text = environ.get(DIRECT_CALL, "").strip()
    return bool(_read(DIRECT_CALL, text, BOOL)) if text else True


def check_outputs_wanted(environ: Mapping[str, str]) -> bool:
    """Whether :data:`CHECK_OUTPUTS` asks for the check; it does not unless it says yes.

    Raises:
        ConfigError: for a value that is neither yes nor no.
    """
    text = environ.get(CHECK_OUTPUTS, "").strip()
    return bool(_read(CHECK_OUTPUTS, text, BOOL)) if text else False


def _read(variable: str, text: str, kind: Kind) -> Any:
    assert kind.read is not None
    try:
        return kind.accept(kind.read(text))
    except BadValue as bad:
        raise ConfigError(f"environment variable {variable}: {bad}") from None


def _warn_unused(variable: str, names: Mapping[str, str], kinds: Mapping[str, Kind]) -> None:
    if variable in _warned:
        return
    _warned.add(variable)
    setting = variable.removeprefix(PREFIX).lower()
    if setting in kinds:
        warnings.warn(f"{variable}: {setting} cannot be set by a variable, only in code", stacklevel=4)
        return
    near = nearest(variable.removeprefix(PREFIX), [name.removeprefix(PREFIX) for name in names])
    hint = f"did you mean {PREFIX}{near}?" if near else f"valid are: {', '.join(sorted(names))}"
    warnings.warn(f"{variable} is no setting of graphcap: {hint}", stacklevel=4)
