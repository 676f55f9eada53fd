"""Bugs that users of other systems suffered from, by their row in the field notes, and the tests that would see them.

| row | what users saw | tests |
|---|---|---|
| 5 | out of memory during capture | test_account, test_cuda_memory |
| 8 | capturing dominates the start | test_sizes |
| 9 | silently wrong for other sizes than the traced one | test_sizes |
| 11 | memory between two graphs is reused before its last reader | test_liveness, test_cuda |
| 12 | graphs read the addresses of weights that were replaced | test_weights, test_bindings, test_instances |
| 13 | an op is captured that reads what no argument shows | test_trust, test_verify |
| 14 | batches fall off the ladder, above all in speculative decoding | test_sizes |
| 15 | metadata and padding do not fit; padded rows leak | test_sizes, test_padded_calls, test_proof |
| 22 | Python per parameter on each replay | test_trust |
| 23 | a recording for each new shape, memory grows | test_sizes, test_account |
| 24 | the mode that is chosen by itself is slower | test_trust, test_routes |
| 25 | an output is overwritten by a later run | test_outputs, test_output_policies, test_generations |
| 30 | LoRA multiplies graphs | test_sizes |
| 31 | no statistics | test_trust, test_counting |
| 32 | a replay inside of the context of a capture; pools that die too early | test_trust, test_hooks, test_runner |

What engines do with a model beyond that is in test_models.
"""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
TABLE = [
    (int(row), {name.strip() for name in names.split(",")})
    for row, names in re.findall(r"^\| (\d+) \|[^|]*\| ([^|]*) \|$", str(__doc__), re.MULTILINE)
]


@functools.cache
def rows_of(path: Path) -> set[int]:
    """The rows that tests of a file name in their docstrings."""
    functions = [each for each in ast.walk(ast.parse(path.read_text())) if isinstance(each, ast.FunctionDef)]
    texts = [ast.get_docstring(each) or "" for each in functions if each.name.startswith("test_")]
    return {int(row) for text in texts for row in re.findall(r"Field notes row (\d+)", text)}


@pytest.mark.parametrize(("row", "names"), TABLE)
def test_the_table_names_the_files_with_a_test_for_the_row(row: int, names: set[str]) -> None:
    """Neither more nor less."""
    found = {path.stem for path in TESTS.rglob("test_*.py") if row in rows_of(path)}
    assert found == names


def test_the_table_is_complete() -> None:
    """The rows that the graph runtime answers for."""
    assert [row for row, _ in TABLE] == [5, 8, 9, 11, 12, 13, 14, 15, 22, 23, 24, 25, 30, 31, 32]
