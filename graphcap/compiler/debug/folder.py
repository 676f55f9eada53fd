"""The folder of one region under ``debug_dir``. Its file names and texts are the same for a cold and a warm start.

What differs between two runs (times, where an artifact came from, process ids) is in ``timeline.jsonl`` alone.
Twins get one line, not a copy.
"""

from __future__ import annotations

import itertools
import logging
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from graphcap.compiler.debug import readable
from graphcap.compiler.debug.bytecode import write_bytecode_later
from graphcap.compiler.debug.graph_source import NotReproducible
from graphcap.compiler.debug.repro import holds_tensors, repro_source
from graphcap.compiler.debug.timeline import Timeline
from graphcap.compiler.pieces import CompiledPiece
from graphcap.compiler.region import Region
from graphcap.compiler.split import Piece
from graphcap.cudagraph import PlanStats

log = logging.getLogger(__name__)

_INDEX = """\
before_split.py            the graph that Dynamo traced
after_split.py             the same graph cut into pieces
stitched.py                the generated function that calls the pieces
pieces/piece_N.py          a piece; a twin of an earlier piece is one line
pieces/piece_N.PASS.before.py, .after.py   its graph inside Inductor, around a pass that changed it
pieces/piece_N.inductor.py the code that Inductor generated
pieces/piece_N.repro.py    runs the piece eager and compiled on random inputs: python pieces/piece_N.repro.py
plans/plan_N.py            the generated replay of a captured shape
bytecode/                  what Dynamo made of the function that was traced
timeline.jsonl             what happened when: one JSON object per line
"""


class RegionFolder:
    """Writes one region's files. Every method raises OSError when the disk refuses."""

    def __init__(self, region: Region, path: Path) -> None:
        """Use ``path``, an empty directory that nobody else writes into."""
        self.region, self.path = region, path
        self.timeline = Timeline(path / "timeline.jsonl")
        self._plans = 0
        self._write("README.txt", self._readme(""))
        self.timeline.add(
            "opened", region=region.name, function=region.function, location=region.location,
            compile_id=region.compile_id, recompiled_because=region.recompiled_because, process=os.getpid(),
            rank=os.environ.get("RANK", ""), torch=torch.__version__, python=platform.python_version(),
        )  # fmt: skip
        if region.code is not None:
            write_bytecode_later(region.code, path / "bytecode")

    @classmethod
    def create(cls, debug_dir: str, region: Region) -> RegionFolder:
        """A new folder named for the region; ``forward_0.2`` where an earlier run left a ``forward_0``."""
        for number in itertools.count(1):
            path = Path(debug_dir).expanduser() / (region.name if number == 1 else f"{region.name}.{number}")
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                continue
            return cls(region, path.absolute())
        raise AssertionError("unreachable")

    def graph(self, name: str, gm: fx.GraphModule) -> None:
        """A whole graph as ``<name>.py``."""
        self._write(f"{name}.py", readable.graph_text(gm))
        self.timeline.add(name, nodes=len(gm.graph.nodes))

    def split(self, gm: fx.GraphModule, pieces: Sequence[Piece]) -> None:
        """The graph after the split; written before anything is compiled, in case a compile kills the process."""
        self._write("after_split.py", readable.split_text(gm, pieces))
        self.timeline.add("split", pieces=len(pieces))

    def close(self, pieces: Sequence[Piece], compiled: Sequence[CompiledPiece]) -> None:
        """Everything that is known when the region is compiled."""
        (self.path / "pieces").mkdir(exist_ok=True)
        for index, (piece, result) in enumerate(zip(pieces, compiled, strict=True)):
            if result.twin_of is None:
                twins = [other.name for other, its in zip(pieces, compiled, strict=True) if its.twin_of == index]
                self._piece(piece, result, twins)
            else:
                twin = pieces[result.twin_of].name
                line = f"# {readable.verdict_line(piece)}\n# twin of {twin}: the same graph, the same code\n"
                self._write(f"pieces/{piece.name}.py", line)
                self.timeline.add("twin", at=result.made_at, piece=piece.name, twin_of=twin)
        self._write("stitched.py", f"# {self._title()}\n{self.region.source}")
        self._write("README.txt", self._readme(_piece_table(pieces, compiled)))
        self.timeline.add("ready", seconds=round(self.region.seconds, 4), no_capture=self.region.no_capture)

    def plan(self, plan: PlanStats) -> None:
        """A captured shape: its generated replay."""
        header = [f"# {self._title()}", f"# {plan.mode} plan for key {plan.key}: {plan.num_segments} segments"]
        header += [f"# live: {name}: {reason}" for name, reason in plan.live.items()]
        (self.path / "plans").mkdir(exist_ok=True)
        self._write(f"plans/plan_{self._plans}.py", "\n".join(header) + f"\n{plan.source}")
        self.timeline.add(
            "captured", plan=self._plans, key=plan.key, mode=plan.mode, segments=plan.num_segments,
            seconds=round(plan.seconds, 4), bytes=plan.bytes,
        )  # fmt: skip
        self._plans += 1

    def _piece(self, piece: Piece, result: CompiledPiece, twins: Sequence[str]) -> None:
        mutated = [piece.inputs[position].name for position in result.mutates]
        stem = f"pieces/{piece.name}"
        self._write(f"{stem}.py", readable.piece_text(piece, twins, mutated, result.key))
        self._repro(piece)
        if result.output_code:
            self._write(f"{stem}.inductor.py", result.output_code)
        self._passes(stem, result)
        facts: dict[str, Any] = {"note": result.note} if result.note else {}
        if result.passes:
            facts["passes"] = {each.name: each.matches for each in result.passes}
        seconds = round(result.seconds, 4)
        self.timeline.add(result.origin, at=result.made_at, piece=piece.name, seconds=seconds, key=result.key, **facts)

    def _passes(self, stem: str, result: CompiledPiece) -> None:
        """Before and after of each pass; a pass that changed several graphs of one piece is numbered."""
        seen: dict[str, int] = {}
        for each in result.passes:
            if each.before is None or each.after is None:
                continue
            seen[each.name] = seen.get(each.name, 0) + 1
            label = each.name if seen[each.name] == 1 else f"{each.name}.{seen[each.name]}"
            sites = "".join(f"# {site}\n" for site in each.sites)
            header = f"# {each.name}: {each.matches} matches, {each.replaced} rewritten\n{sites}"
            self._write(f"{stem}.{label}.before.py", header + each.before)
            self._write(f"{stem}.{label}.after.py", header + each.after)

    def _repro(self, piece: Piece) -> None:
        if not holds_tensors(piece):
            return
        try:
            text = repro_source(f"{piece.name} of {self.region.name}", piece, self.region.config)
        except NotReproducible as reason:
            text = f"raise SystemExit({f'{piece.name} cannot run on its own: {reason}'!r})\n"
        self._write(f"pieces/{piece.name}.repro.py", text)

    def _title(self) -> str:
        region = self.region
        return f"{region.name}: {region.function}, {region.location}, graph {region.compile_id}"

    def _readme(self, table: str) -> str:
        because = self.region.recompiled_because
        lines = [self._title(), *([f"compiled again because {because}"] if because else []), "", _INDEX]
        return "\n".join(lines) + (f"\n{table}" if table else "")

    def _write(self, name: str, text: str) -> None:
        (self.path / name).write_text(text, encoding="utf-8")


def _piece_table(pieces: Sequence[Piece], compiled: Sequence[CompiledPiece]) -> str:
    lines = []
    for piece, result in zip(pieces, compiled, strict=True):
        twin = f" | twin of {pieces[result.twin_of].name}" if result.twin_of is not None else ""
        lines.append(f"{readable.verdict_line(piece)}{twin}\n")
    return "".join(lines)
