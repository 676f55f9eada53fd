"""The errors: their classes, and the help inside the message."""

from __future__ import annotations

import pickle

import pytest

from graphcap import errors


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (errors.ConfigError, ValueError),
        (errors.DimError, ValueError),
        (errors.PassRequiredError, RuntimeError),
        (errors.RecompileError, RuntimeError),
        (errors.MissingExtraError, ImportError),
    ],
)
def test_each_error_is_ours_and_a_builtin(error: type[Exception], builtin: type[Exception]) -> None:
    assert issubclass(error, errors.GraphcapError)
    assert issubclass(error, builtin)
    assert error.__name__ in (errors.__doc__ or ""), "the hierarchy in the module's docstring lists it"


def test_missing_extra_is_one_line_with_the_pip_command() -> None:
    error = errors.MissingExtraError("debug", "depyf", "decompiled bytecode")
    assert str(error) == "decompiled bytecode needs the package depyf: pip install 'torch-graphcap[debug]'"
    assert error.name == "depyf"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("capture_size", "did you mean 'capture_sizes'?"),
        ("OUTPUTS", "did you mean 'outputs'?"),
        ("zzz", "valid are: capture_sizes, outputs"),
    ],
)
def test_did_you_mean(name: str, hint: str) -> None:
    assert errors.did_you_mean(name, ["outputs", "capture_sizes"]) == hint


def test_did_you_mean_without_candidates() -> None:
    assert errors.did_you_mean("x", []) == "valid are: (none)"
