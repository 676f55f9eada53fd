"""The documents keep up with the code."""

from __future__ import annotations

import ast
import dataclasses
import enum
import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

import graphcap
from graphcap.config import KINDS, Config
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
    without_text = [name for name, kind in KINDS.items() if kind.read is None]
    listed = re.search(r"Every field but (.*?) can be\s+set as\s+an environment", README, re.DOTALL)
    assert listed is not None
    assert sorted(re.findall(r"`(\w+)`", listed.group(1))) == sorted(without_text)
    for mode in MODES:
        assert f"`{mode}`" in README


def test_ci_runs_the_readme_commands() -> None:
    commands = re.search(r"## Two commands.*?```sh\n(.*?)```", README, re.DOTALL)
    assert commands is not None
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    for line in commands.group(1).splitlines():
        assert line.partition("#")[0].strip() in ci


DECISIONS = [str(path.relative_to(ROOT)) for path in (ROOT / "docs" / "adr").glob("*.md")]


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", *sorted(DECISIONS)])
def test_links_lead_somewhere(document: str) -> None:
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_links_within_the_readme_lead_to_a_heading() -> None:
    headings = {title.lower().replace(" ", "-") for title in re.findall(r"^#+ ([\w -]+)$", README, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([\w-]+)\)", README)) <= headings


def test_code_in_the_readme_parses_and_its_names_exist() -> None:
    for block in re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL):
        ast.parse(block)
    names = set(re.findall(r"\bgraphcap\.([A-Za-z_]\w*)", README))
    assert names <= set(graphcap.__all__), names - set(graphcap.__all__)


def test_the_serving_example_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHCAP_COMPILER", "eager")
    text = README.partition("<!-- serving -->")[2].partition("<!-- /serving -->")[0]
    (tmp_path / "readme_serving.py").write_text(text.strip().removeprefix("```python\n").removesuffix("```"))
    spec = importlib.util.spec_from_file_location("readme_serving", tmp_path / "readme_serving.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, example)  # Dynamo looks a function's module up by name
    with graphcap.allow_capture():  # what the example forbids is allowed again
        spec.loader.exec_module(example)

    assert [key.num_tokens for key in example.summary.captured] == [8, 4, 2, 1]
    assert not example.summary.skipped
    assert (example.decision.mode.name, example.decision.num_tokens) == ("FULL", 4)
    with graphcap.disabled(), torch.inference_mode():
        expected = example.model(torch.tensor([17, 4, 99], device=example.device))
    torch.testing.assert_close(example.logits, expected)
    (region,) = graphcap.explain(example.model).regions
    assert [plan.replays for plan in sorted(region.plans, key=lambda plan: plan.key)] == [0, 0, 1, 0]
    assert set(region.live_calls) == {"warm-up"}


def test_every_decision_is_listed() -> None:
    listed = set(re.findall(r"\]\((\d{4}-[\w-]+\.md)\)", (ROOT / "docs" / "adr" / "README.md").read_text()))
    assert listed == {path.name for path in (ROOT / "docs" / "adr").glob("[0-9]*.md")}
