from __future__ import annotations

import dataclasses
import enum
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from graphcap.passes import GraphPass, PassResult
from graphcap.passes.add_rms_norm import AddRmsNorm
from graphcap.passes.fingerprint import canonical


class Configured(GraphPass):
    name = "configured"

    def __init__(self, **options: Any) -> None:
        vars(self).update(options)

    def __call__(self, graph: fx.Graph) -> PassResult:
        return PassResult(self.name)


class Derived(Configured):
    pass


class Depending(Configured):
    depends_on = ("graphcap.errors",)


class Mode(enum.Enum):
    A = 1
    B = 2


@dataclasses.dataclass(frozen=True)
class Options:
    eps: float
    mode: Mode = Mode.A


atoms = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
values = st.recursive(
    atoms | st.sampled_from([torch.float32, torch.bfloat16, torch.device("cpu"), torch.device("cuda", 1), *Mode]),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def same(left: Any, right: Any) -> bool:
    """Equality that tells 1 from True and 1.0, and 0.0 from -0.0: they generate different code."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)) and type(left) is type(right):
        return len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and left == right and repr(left) == repr(right)


@given(values, values)
def test_fingerprints_agree_exactly_when_the_options_do(left: Any, right: Any) -> None:
    assert (Configured(option=left).fingerprint() == Configured(option=right).fingerprint()) == same(left, right)
    assert Configured(option=left).fingerprint() == Configured(option=left).fingerprint()


def test_passes_that_differ_in_one_option_do_not_collide() -> None:
    variants = [
        Configured(), Configured(eps=1e-5), Configured(eps=1e-6), Configured(epsilon=1e-5), Derived(eps=1e-5),
        Depending(eps=1e-5), Configured(eps=Options(1e-5)), Configured(eps=Options(1e-5, Mode.B)),
    ]  # fmt: skip
    assert len({variant.fingerprint() for variant in variants}) == len(variants)


@given(st.dictionaries(st.text(), st.integers(), min_size=2), st.sets(st.integers()))
def test_order_of_mappings_and_sets_does_not_matter(mapping: dict[str, int], members: set[int]) -> None:
    assert canonical(mapping) == canonical(dict(reversed(mapping.items())))
    assert canonical(members) == canonical(frozenset(members)).removeprefix("frozen")


@pytest.mark.parametrize("option", [lambda node: True, object(), torch.ones(2), print])
def test_an_option_without_canonical_text_is_refused(option: Any) -> None:
    with pytest.raises(TypeError, match=r"override fingerprint\(\)"):
        Configured(option=option).fingerprint()


def test_a_module_without_source_is_refused() -> None:
    class Lost(Configured):
        depends_on = ("graphcap.no_such_module",)

    with pytest.raises(TypeError, match=r"graphcap\.no_such_module"):
        Lost().fingerprint()


def test_fingerprint_is_the_same_in_another_process() -> None:
    code = "from graphcap.passes.add_rms_norm import AddRmsNorm; print(AddRmsNorm().fingerprint())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == AddRmsNorm().fingerprint()
    assert AddRmsNorm().fingerprint() != AddRmsNorm(rewrite_on=("cpu",)).fingerprint()
