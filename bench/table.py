"""Renders the measured tables of README.md and of the guides from bench/results/*.json.

A table stands between two markers, ``<!-- bench:NAME -->`` and ``<!-- /bench:NAME -->``, where NAME is the stem of the
JSON file or one of :data:`~bench.summaries.SUMMARIES`. ``python -m bench.table`` rewrites what is between them;
``--check`` only says whether it would change.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.markdown import Row, environment_line, error, factor, hundredth, line, tenth, whole
from bench.summaries import SUMMARIES

ROOT = Path(__file__).parents[1]
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


@dataclass(frozen=True)
class Column:
    """A column: its heading, the row's field, and how its value is written."""

    heading: str
    field: str
    form: Callable[[Any], str] = str

    def cell(self, row: Row) -> str:
        value = row.get(self.field)
        return "-" if value is None else self.form(value)


@dataclass(frozen=True)
class Layout:
    """How one bench's rows become tables: one per value of ``group``, titled by ``title``."""

    group: tuple[str, ...]
    title: Callable[[Row], str]
    names: tuple[Column, ...]
    figures: tuple[Column, ...]


LAYOUTS = {
    "decode": Layout(
        group=("model", "batch"),
        title=lambda row: f"{row['model']}-like decoder, batch {row['batch']}",
        names=(Column("variant", "variant"),),
        figures=(
            Column("step us, mean", "step_mean_us", whole),
            Column("median", "step_median_us", whole),
            Column("P99", "step_p99_us", whole),
            Column("x floor", "x_floor", factor),
            Column("host us, mean", "host_mean_us", tenth),
            Column("median", "host_median_us", tenth),
            Column("P99", "host_p99_us", tenth),
            Column("tokens/s", "tokens_per_s", whole),
            Column("error vs fp32", "relative_error", error),
        ),
    ),
    "replay": Layout(
        group=("model", "batch"),
        title=lambda row: f"{row['model']}-like decoder, batch {row['batch']}",
        names=(Column("variant", "variant"),),
        figures=(
            Column("host us, mean", "host_mean_us", tenth),
            Column("median", "host_median_us", tenth),
            Column("P99", "host_p99_us", tenth),
            Column("step us, mean", "step_mean_us", whole),
            Column("x floor", "x_floor", factor),
            Column("error vs fp32", "relative_error", error),
        ),
    ),
    "ladder": Layout(
        group=("model", "part"),
        title=lambda row: f"{row['model']}-like decoder, {row['part']}",
        names=(Column("variant", "variant"),),
        figures=(
            Column("sizes", "num_sizes"),
            Column("seconds", "seconds", hundredth),
            Column("MiB", "memory_mib", whole),
            Column("graphs", "num_graphs"),
            Column("calls", "num_calls"),
            Column("rows", "num_rows"),
            Column("wrong rows", "wrong_rows"),
            Column("live calls in the ladder", "live_in_ladder"),
            Column("MiB grown", "grown_mib", tenth),
            Column("worst row", "worst_row", error),
        ),
    ),
    "engine": Layout(
        group=("model", "traffic"),
        title=lambda row: f"{row['model']}-like engine, {row['traffic']}",
        names=(Column("variant", "variant"),),
        figures=(
            Column("tokens/s", "tokens_per_s", whole),
            Column("x hand-made", "x_hand_made", factor),
            Column("step ms, P50", "step_median_ms", hundredth),
            Column("P99", "step_p99_ms", hundredth),
            Column("error vs fp32", "relative_error", error),
            Column("wrong rows", "wrong_rows"),
            Column("ready s", "build_s", tenth),
            Column("MiB", "memory_mib", whole),
        ),
    ),
    "hf_generate": Layout(
        group=("model", "batch"),
        title=lambda row: f"{row['model']}, batch {row['batch']}, {row.get('new_tokens', '?')} new tokens",
        names=(Column("cache", "cache"), Column("variant", "variant")),
        figures=(
            Column("tokens/s", "tokens_per_s", whole),
            Column("first token ms", "first_token_ms", tenth),
            Column("first call s", "first_call_s", tenth),
            Column("second call s", "second_call_s", tenth),
            Column("tokens as eager", "same_tokens"),
        ),
    ),
    "startup": Layout(
        group=("model",),
        title=lambda row: f"{row['model']}-like decoder, batch 1, new process",
        names=(Column("variant", "variant"), Column("cache", "cache")),
        figures=(
            Column("import s", "import_s", hundredth),
            Column("first call s", "first_call_s", hundredth),
            Column("of which Dynamo", "dynamo_s", hundredth),
            Column("backend", "backend_s", hundredth),
            Column("second call s", "second_call_s", hundredth),
            Column("third call s", "third_call_s", hundredth),
            Column("process s", "process_s", hundredth),
        ),
    ),
}


def row_cells(layout: Layout, row: Row) -> list[str]:
    """A row's cells; one that failed or was skipped says why in its first figure."""
    names = [column.cell(row) for column in layout.names]
    if row["status"] == "ok":
        return names + [column.cell(row) for column in layout.figures]
    reason = str(row["status"]).replace("|", "\\|")
    return [*names, reason, *[""] * (len(layout.figures) - 1)]


def group_table(layout: Layout, rows: Sequence[Row]) -> str:
    """One titled Markdown table."""
    columns = (*layout.names, *layout.figures)
    measured = next((row for row in rows if row["status"] == "ok"), rows[0])
    rule = ["---"] * len(layout.names) + ["---:"] * len(layout.figures)
    lines = [f"**{layout.title(measured)}**", "", line([column.heading for column in columns]), line(rule)]
    return "\n".join(lines + [line(row_cells(layout, row)) for row in rows])


def render(content: Row) -> str:
    """The Markdown of a result file: a table per group in the rows' order, then where it was measured.

    Skipped rows, where a variant does not apply, are left out; failed ones are shown.

    Raises:
        KeyError: no layout for the file's ``bench``.
    """
    layout = LAYOUTS[content["bench"]]
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in content["rows"]:
        if row["status"].startswith("skipped"):
            continue
        groups.setdefault(tuple(row[name] for name in layout.group), []).append(row)
    tables = [group_table(layout, rows) for rows in groups.values()]
    return "\n\n".join([*tables, environment_line(content)])


def between_markers(text: str, name: str) -> re.Match[str] | None:
    """The marked part of a text for one bench; its group ``body`` is what stands between the markers."""
    pattern = rf"(?P<open><!-- bench:{name} -->\n)(?P<body>.*?)(?P<close><!-- /bench:{name} -->)"
    return re.search(pattern, text, flags=re.DOTALL)


def filled(text: str, results: Path) -> str:
    """The text with every marked part rendered from its result file where that file exists."""
    for name, (stem, write) in {**{name: (name, render) for name in LAYOUTS}, **SUMMARIES}.items():
        path = results / f"{stem}.json"
        found = between_markers(text, name)
        if found and path.exists():
            body = write(json.loads(path.read_text())) + "\n"
            text = text[: found.start("body")] + body + text[found.end("body") :]
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", type=Path, action="append", help="default: README.md and docs/*.md")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the tables are not up to date")
    arguments = parser.parse_args()
    for path in arguments.readme or DOCUMENTS:
        before = path.read_text()
        after = filled(before, arguments.results)
        if after == before:
            print(f"{path.name}: tables are up to date")
        elif arguments.check:
            raise SystemExit(f"{path}: tables differ from {arguments.results}; run python -m bench.table")
        else:
            path.write_text(after)
            print(f"rewrote the tables of {path}")


if __name__ == "__main__":
    main()
