"""The guides keep up with the code: links, names, settings, figures."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import pytest

import graphcap
from bench import table
from graphcap.config import Config
from graphcap.precedence import ALIASES

DOCS = Path(__file__).parents[1] / "docs"
GUIDES = sorted(DOCS.glob("*.md"))
SETTINGS = {field.name for field in dataclasses.fields(Config)} | set(ALIASES)
#: keywords of our functions that are no settings
ARGUMENTS = {
    "backend",
    "mode",
    "model",
    "options",
    "dynamic",
    "frontend",
    "fullgraph",
    "enable_if",
    "tags",
    "inputs",
    "max_mode",
    "capture",
}
ARGUMENTS |= {"num_tokens", "num_reqs", "uniform_query_len", "mutates_args"}


@pytest.fixture(params=GUIDES, ids=[path.stem for path in GUIDES])
def guide(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def code_blocks(text: str) -> list[str]:
    return re.findall(r"^ *```python\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)


def test_links_lead_somewhere(guide: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", guide.read_text()):
        assert (guide.parent / target).exists(), target


def test_code_parses_and_names_exist(guide: Path) -> None:
    for block in code_blocks(guide.read_text()):
        indent = len(block) - len(block.lstrip(" "))
        ast.parse("\n".join(line[indent:] for line in block.splitlines()))
    names = set(re.findall(r"\bgraphcap\.([A-Za-z_]\w*)", guide.read_text()))
    known = {*graphcap.__all__, "cudagraph"}  # the part that stands on its own
    assert names <= known, names - known


def test_settings_exist(guide: Path) -> None:
    """What begins as ``name=`` in backquotes is a setting or an argument of ours."""
    written = re.findall(r"`(\w+)=", guide.read_text())
    ours = {name for name in written if name.islower()}
    assert ours <= SETTINGS | ARGUMENTS, ours - SETTINGS - ARGUMENTS


def test_variables_exist(guide: Path) -> None:
    names = {name.lower() for name in re.findall(r"\bGRAPHCAP_(\w+)", guide.read_text())}
    assert names <= SETTINGS, names - SETTINGS


def test_figures_are_the_measured_ones(guide: Path) -> None:
    text = guide.read_text()
    assert table.filled(text, table.ROOT / "bench" / "results") == text, "run python -m bench.table"


def test_lines_of_code_fit(guide: Path) -> None:
    for block in code_blocks(guide.read_text()):
        for line in block.splitlines():
            assert len(line) <= 120, line


def test_every_guide_is_listed() -> None:
    listed = set(re.findall(r"\]\(([\w-]+\.md)\)", (DOCS / "README.md").read_text()))
    assert listed == {path.name for path in GUIDES} - {"README.md"}
