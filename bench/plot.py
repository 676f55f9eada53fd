"""Draws bench/results/replay.json: host and step time over the batch size, one line per variant.

python -m bench.plot            # writes bench/results/replay.png; without matplotlib it prints the curves
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench.harness import say

#: what is drawn, by the field of a row: label and scale
QUANTITIES = {"host_median_us": ("host time of a call, us", "log"), "step_mean_us": ("step, us", "linear")}
Curves = dict[str, list[tuple[int, float]]]


def curves(rows: list[dict[str, Any]], model: str, quantity: str) -> Curves:
    """(batch, value) points by variant, in the order of the batch size; rows that were not measured are left out."""
    found: Curves = {}
    for row in rows:
        if row["model"] == model and row["status"] == "ok" and row.get(quantity) is not None:
            found.setdefault(row["variant"], []).append((row["batch"], row[quantity]))
    return {name: sorted(points) for name, points in found.items()}


def draw(content: dict[str, Any], path: Path) -> bool:
    """Write the picture; whether there was something to draw with."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot, ticker
    except ImportError:
        return False
    names = sorted({row["model"] for row in content["rows"]})
    figure, axes = pyplot.subplots(
        len(names), len(QUANTITIES), figsize=(7 * len(QUANTITIES), 5 * len(names)), squeeze=False
    )
    for model, line in zip(names, axes, strict=True):
        for (quantity, (label, scale)), axis in zip(QUANTITIES.items(), line, strict=True):
            for name, points in curves(content["rows"], model, quantity).items():
                style = "--" if name.startswith("hand-made") else ":" if name.startswith("torch") else "-"
                axis.plot(*zip(*points, strict=True), style, marker="o", markersize=3, label=name)
            axis.set(yscale=scale, xlabel="batch size", ylabel=label, title=f"{model}-like decoder")
            axis.set_xscale("log", base=2)
            for each in (axis.xaxis, axis.yaxis):
                each.set_major_formatter(ticker.FormatStrFormatter("%d"))
            axis.grid(visible=True, which="both", alpha=0.2)
    environment = content["environment"]
    figure.suptitle(f"{environment['device']}, torch {environment['torch']}, commit {environment['commit']}")
    figure.tight_layout(rect=(0, 0.13 / len(names), 1, 1), w_pad=3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=5, fontsize="small", frameon=False)
    figure.savefig(path, dpi=120)
    return True


def printed(content: dict[str, Any]) -> str:
    """The curves as lines of text."""
    lines = []
    for model in sorted({row["model"] for row in content["rows"]}):
        for quantity, (label, _) in QUANTITIES.items():
            lines.append(f"{model}: {label}")
            for name, points in curves(content["rows"], model, quantity).items():
                values = "  ".join(f"{batch}: {value:.1f}" for batch, value in points)
                lines.append(f"  {name:45s} {values}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("bench/results/replay.json"), help="default %(default)s")
    parser.add_argument("--png", type=Path, help="default: beside the JSON file")
    arguments = parser.parse_args()
    content = json.loads(arguments.json.read_text())
    path = arguments.png or arguments.json.with_suffix(".png")
    if draw(content, path):
        say(f"wrote {path}")
    else:
        say(f"matplotlib is not installed, so no picture is drawn\n{printed(content)}")


if __name__ == "__main__":
    main()
