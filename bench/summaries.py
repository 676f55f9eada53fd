"""Short tables of long result files, for the README and the guides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bench.markdown import Row, environment_line, factor, hundredth, line, tenth, whole


def modes(content: Row) -> str:
    """One line per model and batch of the decode bench: the step by mode, and what FULL saves."""
    columns = ("eager", "torch.compile default", "graphcap PIECEWISE", "graphcap FULL")
    steps: dict[str, dict[str, float]] = {}
    for row in content["rows"]:
        if row["status"] == "ok":
            steps.setdefault(f"{row['model']}-like, batch {row['batch']}", {})[row["variant"]] = row["step_mean_us"]
    lines = [line(("decoder", *columns, "eager / FULL")), line(["---"] + ["---:"] * (len(columns) + 1))]
    for name, by_variant in steps.items():
        figures = [whole(by_variant[each]) if each in by_variant else "-" for each in columns]
        first, last = by_variant.get(columns[0]), by_variant.get(columns[-1])
        lines.append(line((name, *figures, tenth(first / last) if first and last else "-")))
    return "\n".join([*lines, "", environment_line(content)])


def across(content: Row, names: Sequence[str], columns: str, field: str, form: Callable[[Any], str]) -> str:
    """One figure: a line for each value of the fields ``names``, a column for each value of the field ``columns``, both
    in the order of the rows. What was not measured is a dash."""
    measured = [row for row in content["rows"] if row["status"] == "ok" and row.get(field) is not None]
    headings = list(dict.fromkeys(row[columns] for row in measured))
    lines: dict[tuple[Any, ...], dict[Any, str]] = {}
    for row in measured:
        lines.setdefault(tuple(row[name] for name in names), {})[row[columns]] = form(row[field])
    table = [line([*names, *map(str, headings)]), line(["---"] * len(names) + ["---:"] * len(headings))]
    table += [
        line([*map(str, name), *(figures.get(each, "-") for each in headings)]) for name, figures in lines.items()
    ]
    return "\n".join([*table, "", environment_line(content)])


def tokens(content: Row) -> str:
    """Tokens per second of ``generate()``. Of our four ways in, which replay the same graphs, the two that differ: the
    prefill is compiled, or only the decode steps."""
    shown = (
        "eager",
        "torch.compile default",
        "HF auto-compile",
        "graphcap: model.compile",
        "graphcap: CompileConfig",
    )
    rows = [row for row in content["rows"] if row["variant"] in shown]
    return across({**content, "rows": rows}, ["model", "batch", "cache"], "variant", "tokens_per_s", whole)


def captures(content: Row) -> str:
    """The ladders of the ladder bench: seconds, memory and graphs by variant."""
    rows = [row for row in content["rows"] if row["status"] == "ok" and row["part"] == "capture"]
    table = [line(["variant", "sizes", "seconds", "MiB", "graphs"]), line(["---", "---:", "---:", "---:", "---:"])]
    for row in rows:
        figures = [row["num_sizes"], hundredth(row["seconds"]), whole(row["memory_mib"]), row.get("num_graphs", "-")]
        table.append(line([row["variant"], *map(str, figures)]))
    return "\n".join([*table, "", environment_line(content)])


#: By the name of their markers: the result file, and what writes the table.
SUMMARIES: dict[str, tuple[str, Callable[[Row], str]]] = {
    "decode-modes": ("decode", modes),
    "replay-host": ("replay", lambda content: across(content, ["variant"], "batch", "host_median_us", whole)),
    "replay-step": ("replay", lambda content: across(content, ["variant"], "batch", "x_floor", factor)),
    "engine-tokens": ("engine", lambda content: across(content, ["variant"], "traffic", "x_hand_made", factor)),
    "hf-tokens": ("hf_generate", tokens),
    "ladder-captures": ("ladder", captures),
}
