"""Every error that graphcap raises on purpose.

::

    GraphcapError
    |-- ConfigError         a setting has an unknown name, a wrong type or a value out of range      (ValueError)
    |-- DimError            `dynamic_arg_dims` does not fit the function or the call                 (ValueError)
    |-- PassRequiredError   a pass named in `require_passes` matched nothing                         (RuntimeError)
    |-- RecompileError      compilation_mode=DYNAMO_TRACE_ONCE, and a guard asked for a second trace (RuntimeError)
    |-- GuardError          guards="sealed", and what the compiled code relies on has changed        (RuntimeError)
    |-- RankError           ranks of a `process_group` do not make the same calls                    (RuntimeError)
    |-- StaleOutputError    an output of outputs="static" or "ring:N" was read after it was overwritten (RuntimeError)
    |-- StepError           a batch that `graphcap.step` describes does not exist or does not fit    (ValueError)
    `-- MissingExtraError   an optional package is not installed                                     (ImportError)

What goes wrong inside graphcap itself (a capture, the cache, a pass, a dump) is not an error for the caller: the model
runs on without it, one warning says why, and ``graphcap.explain()`` shows it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GraphcapError(Exception):
    """Base class: ``except graphcap.GraphcapError`` catches every error below."""


class ConfigError(GraphcapError, ValueError):
    """A setting has an unknown name, a wrong type or a value out of range."""


class DimError(GraphcapError, ValueError):
    """``dynamic_arg_dims`` names an argument or a dim that the function or the call does not have."""


class PassRequiredError(GraphcapError, RuntimeError):
    """A pass named in ``require_passes`` matched nothing in the whole region."""


class RecompileError(GraphcapError, RuntimeError):
    """``compilation_mode=DYNAMO_TRACE_ONCE`` and a guard failed, so that Dynamo wanted a second trace."""


class GuardError(GraphcapError, RuntimeError):
    """``guards="sealed"`` and something that the compiled code relies on has changed; the message names the guard."""


class RankError(GraphcapError, RuntimeError):
    """The ranks of a ``process_group`` do not make the same calls; the message names what they ask each other."""


class StaleOutputError(GraphcapError, RuntimeError):
    """An output of ``outputs="static"`` or ``"ring:N"`` was read after a later replay had written into its memory."""


class StepError(GraphcapError, ValueError):
    """The batch that ``graphcap.step`` or ``graphcap.dispatch`` describes cannot exist or does not fit the call."""


class MissingExtraError(GraphcapError, ImportError):
    """An optional package is needed and not installed."""

    def __init__(self, extra: str, package: str, purpose: str) -> None:
        """Say in one line what is missing and how to get it.

        Args:
            extra: the extra of the distribution that brings the package (``"debug"``).
            package: the import name that was not found (``"depyf"``).
            purpose: what needs it, as the start of a sentence (``"decompiled bytecode in the dumps"``).
        """
        super().__init__(f"{purpose} needs the package {package}: pip install 'torch-graphcap[{extra}]'", name=package)
        self.extra = extra
        self.package = package
        self.purpose = purpose

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str, str, str]]:
        return type(self), (self.extra, self.package, self.purpose)


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The name in ``valid`` that looks most like ``name``, whatever the case; ``None`` when none is near."""
    by_folded = {candidate.casefold(): candidate for candidate in sorted(valid)}
    near = difflib.get_close_matches(name.casefold(), by_folded, n=1, cutoff=0.6)
    return by_folded[near[0]] if near else None


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """The end of an "unknown name" message: the nearest valid name, or all of them when none is near.

    Returns:
        ``"did you mean 'capture_sizes'?"`` or ``"valid are: clone, ring"``.
    """
    names = sorted(valid)
    near = nearest(name, names)
    return f"did you mean {near!r}?" if near else f"valid are: {', '.join(names) or '(none)'}"
