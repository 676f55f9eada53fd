from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import torch
from hypothesis import given
from hypothesis import strategies as st

from graphcap.cache import KeyParts, PieceKey, toolchain_identity
from tests.cache.conftest import key_for

PARTS = [field.name for field in dataclasses.fields(PieceKey)]
# A tiny alphabet, so that shifting a character from one part to the next is tried.
text = st.text("ab\x00", max_size=3)
keys = st.builds(PieceKey, **dict.fromkeys(PARTS, text))


@given(keys, keys)
def test_digests_agree_exactly_when_all_parts_do(left: PieceKey, right: PieceKey) -> None:
    assert (left.digest == right.digest) == (left == right)


@given(keys, st.sampled_from(PARTS), text)
def test_changing_one_part_changes_the_digest_and_is_named(key: PieceKey, part: str, value: str) -> None:
    other = dataclasses.replace(key, **{part: value})
    expected = () if other == key else (part,)
    assert key.parts().changed(other.parts()) == expected
    assert (key.digest != other.digest) == bool(expected)


@given(st.builds(PieceKey, **dict.fromkeys(PARTS, st.text(st.characters(codec=None)))))
def test_any_text_can_be_a_part(key: PieceKey) -> None:
    assert len(key.digest) == 64
    assert bytes.fromhex(key.digest)


def test_digest_is_the_same_in_another_process() -> None:
    code = "from tests.cache.conftest import key_for; print(key_for().digest)"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == key_for().digest


def test_parts_survive_json_and_print_on_one_line() -> None:
    parts = key_for().parts()
    assert KeyParts.from_dict(json.loads(json.dumps(parts.to_dict()))) == parts
    assert str(parts).split()[0] == f"graph={parts.graph[:12]}"
    assert "\n" not in str(parts)


def test_toolchain_names_torch_and_python() -> None:
    identity = json.loads(toolchain_identity())
    assert identity["torch"] == str(torch.__version__)
    assert identity["python"].endswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    assert identity["torch_sources"]
    assert toolchain_identity() == toolchain_identity()
