"""The documents keep up with the code."""

from __future__ import annotations

import dataclasses
import enum
import re
from pathlib import Path

import pytest

from graphcap.config import Config
from graphcap.precedence import ALIASES, DEBUGGING_SWITCHES, MODES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def config_table() -> dict[str, tuple[str, str]]:
    """README's table of settings: field -> (default, meaning)."""
    table = README.partition("<!-- config-table -->")[2].partition("<!-- /config-table -->")[0]
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \| (.+) \|$", table, re.MULTILINE)
    return {field: (default, meaning) for field, default, meaning in rows}


def written(value: object) -> str:
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, str):
        return f'"{value}"'
    return str(dict(value)) if hasattr(value, "keys") else str(value)


def test_table_lists_every_setting_with_its_default() -> None:
    defaults = {row.name: written(row.value) for row in Config().describe()}
    assert {field: default for field, (default, _) in config_table().items()} == defaults
    assert list(config_table()) == [field.name for field in dataclasses.fields(Config)]


def test_aliases_switches_and_modes_are_in_the_readme() -> None:
    for alias, field in ALIASES.items():
        assert f"`{alias}`" in config_table()[field][1]
    for name in DEBUGGING_SWITCHES:
        assert re.search(rf"^\| `GRAPHCAP_{name.upper()}=", README, re.MULTILINE), name
    for mode in MODES:
        assert f"`{mode}`" in README


def test_ci_runs_the_readme_commands() -> None:
    commands = re.search(r"## Two commands.*?```sh\n(.*?)```", README, re.DOTALL)
    assert commands is not None
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    for line in commands.group(1).splitlines():
        assert line.partition("#")[0].strip() in ci


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "docs/adr/README.md", "docs/adr/0001-layout.md"])
def test_links_lead_somewhere(document: str) -> None:
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_every_decision_is_listed() -> None:
    listed = set(re.findall(r"\]\((\d{4}-[\w-]+\.md)\)", (ROOT / "docs" / "adr" / "README.md").read_text()))
    assert listed == {path.name for path in (ROOT / "docs" / "adr").glob("[0-9]*.md")}
