"""``debug_dir``: which files a region leaves, what is in them, and that a failing dump harms nobody."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import fx

import graphcap
from graphcap.compiler import region
from graphcap.compiler.debug import readable
from graphcap.compiler.debug.folder import RegionFolder
from graphcap.passes import GraphPass, PassResult
from tests.compiler.small import Mlp, Stack, compiled


@pytest.fixture(autouse=True)
def _no_regions(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(region, "_numbers", itertools.count())
    region.forget_regions()
    yield
    region.forget_regions()


def call(module: torch.nn.Module, times: int = 1) -> torch.Tensor:
    x = torch.arange(24.0).reshape(3, 8)
    with torch.no_grad():
        return [module(x) for _ in range(times)][-1]


def texts(folder: Path) -> dict[str, str]:
    """Every file of a dump but the timeline."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "timeline.jsonl"]
    return {str(path.relative_to(folder)): path.read_text() for path in files}


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "timeline.jsonl").read_text().splitlines()]


def test_a_region_leaves_its_graphs_pieces_and_stitched_function(tmp_path: Path) -> None:
    call(compiled(Stack(), debug_dir=str(tmp_path)))
    dump = texts(tmp_path / "Stack_0")
    assert {"README.txt", "before_split.py", "after_split.py", "stitched.py"} <= set(dump)
    assert {f"pieces/piece_{i}.py" for i in range(7)} <= set(dump)
    assert "scaled_dot_product_attention" in dump["before_split.py"]
    assert dump["after_split.py"].index("class piece_0") < dump["after_split.py"].index("class piece_6")
    assert "piece_6(" in dump["stitched.py"]
    compile(dump["stitched.py"], "stitched.py", "exec")
    assert "splitting op aten::scaled_dot_product_attention" in dump["README.txt"]


def test_a_twin_is_one_line_and_its_original_counts_it(tmp_path: Path) -> None:
    call(compiled(Stack(), debug_dir=str(tmp_path)))
    dump = texts(tmp_path / "Stack_0")
    assert "twin of piece_2" in dump["pieces/piece_4.py"]
    assert "def forward" not in dump["pieces/piece_4.py"]
    assert "pieces/piece_4.repro.py" not in dump
    assert "x2: the same code runs as piece_4" in dump["pieces/piece_2.py"]
    assert "layers.0" in dump["pieces/piece_2.py"]
    assert "small.py:" in dump["pieces/piece_2.py"]


def test_the_timeline_says_what_happened_in_order(tmp_path: Path) -> None:
    call(compiled(Stack(), debug_dir=str(tmp_path)))
    timeline = events(tmp_path / "Stack_0")
    names = [each["event"] for each in timeline]
    assert names[:3] == ["opened", "before_split", "split"]
    assert names[3:-1] == ["eager", "eager", "eager", "twin", "twin", "twin", "eager"]
    assert names[-1] == "ready"
    times = [each["time"] for each in timeline]
    assert times == sorted(times)


def test_a_second_run_does_not_mix_with_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call(compiled(Stack(1), debug_dir=str(tmp_path)))
    monkeypatch.setattr(region, "_numbers", itertools.count())
    torch._dynamo.reset()
    call(compiled(Stack(1), debug_dir=str(tmp_path)))
    assert sorted(path.name for path in tmp_path.glob("Stack_*")) == ["Stack_0", "Stack_0.2"]


def test_a_plan_is_written_when_it_is_captured(tmp_path: Path) -> None:
    model = compiled(Stack(1), debug_dir=str(tmp_path), simulate=True)
    call(model, times=2)
    assert not (tmp_path / "Stack_0" / "plans").exists()
    call(model, times=3)
    assert "def replay" in (tmp_path / "Stack_0" / "plans" / "plan_0.py").read_text()
    assert len(list((tmp_path / "Stack_0" / "plans").iterdir())) == 1


class OneMinusMinusOne(GraphPass):
    """Writes every ``x + 1`` as ``x - (-1)``: a pass whose change can be seen."""

    name: ClassVar[str] = "one_minus_minus_one"

    def __call__(self, graph: fx.Graph) -> PassResult:
        found = [n for n in graph.nodes if n.target is torch.ops.aten.add.Tensor and n.args[1] == 1]
        for node in found:
            node.target = torch.ops.aten.sub.Tensor
            node.args = (node.args[0], -1)
        return PassResult(self.name, matches=len(found), replaced=len(found), sites=("small.py:1 (here)",))


def test_a_warm_start_writes_the_same_files_as_a_cold_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphcap.passes.pipeline.stages", lambda: (OneMinusMinusOne(),))
    model = Mlp().eval()
    x = torch.randn(5, 4)
    with torch.no_grad():
        expected = model(x)
        for run in ("cold", "warm"):
            monkeypatch.setattr(region, "_numbers", itertools.count())
            torch._dynamo.reset()
            compiled(model, compiler="inductor", debug_dir=str(tmp_path / run))
            torch.testing.assert_close(model(x), expected)
    cold, warm = texts(tmp_path / "cold" / "Mlp_0"), texts(tmp_path / "warm" / "Mlp_0")
    assert set(cold) == set(warm)
    # Dynamo and depyf number their names through a process, and both runs are in this one.
    assert {k: v for k, v in cold.items() if "bytecode" not in k} == {k: warm[k] for k in warm if "bytecode" not in k}
    assert "sub" in cold["pieces/piece_0.one_minus_minus_one.after.py"]
    assert "sub" not in cold["pieces/piece_0.one_minus_minus_one.before.py"].replace("subgraph", "")
    assert "small.py:1 (here)" in cold["pieces/piece_0.one_minus_minus_one.after.py"]
    assert "async_compile" in cold["pieces/piece_0.inductor.py"]
    origins = [{e["event"] for e in events(tmp_path / run / "Mlp_0")} for run in ("cold", "warm")]
    assert "compiled" in origins[0]
    assert "cache" in origins[1]


def test_an_unwritable_folder_is_one_warning_and_a_note(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    model = Stack()
    expected = call(model)
    assert torch.equal(call(compiled(model, debug_dir=str(tmp_path / "file"))), expected)
    assert [record.message for record in caplog.records if "dump is incomplete" in record.message]
    assert any("dump is incomplete" in note for note in graphcap.explain(model).regions[0].notes)


def test_a_full_disk_stops_the_dump_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = RegionFolder._write

    def write(self: RegionFolder, name: str, text: str) -> None:
        if name == "after_split.py":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, name, text)

    monkeypatch.setattr(RegionFolder, "_write", write)
    model = Stack()
    expected = call(model)
    assert torch.equal(call(compiled(model, debug_dir=str(tmp_path))), expected)
    assert sum("No space left" in record.message for record in caplog.records) == 1
    assert not (tmp_path / "Stack_0" / "stitched.py").exists()


def test_without_debug_dir_no_text_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    real = readable.graph_text
    monkeypatch.setattr(readable, "graph_text", lambda gm: made.append("graph") or real(gm))
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "handlers", [])  # nobody traces; pytest itself listens
    call(compiled(Stack()))
    assert made == []
    torch._dynamo.reset()
    call(compiled(Stack(), debug_dir=str(tmp_path)))
    assert made


def test_tlparse_gets_the_same_graphs() -> None:
    seen: dict[str, str] = {}

    class Collect(logging.Handler):
        def emit(self, record: Any) -> None:
            name = getattr(record, "metadata", {}).get("artifact", {}).get("name", "")
            if name.startswith("graphcap_"):
                seen[name] = record.payload

    handler = Collect()
    log = logging.getLogger("torch.__trace")
    log.addHandler(handler)
    try:
        call(compiled(Stack()))
    finally:
        log.removeHandler(handler)
    assert {"graphcap_before_split", "graphcap_after_split", "graphcap_stitched", "graphcap_piece_0"} <= set(seen)
    assert "graphcap_piece_4" not in seen
    assert "piece_6(" in seen["graphcap_stitched"]


def test_bytecode_is_decompiled_where_depyf_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("depyf")
    call(compiled(Stack(1), debug_dir=str(tmp_path)))
    dump = texts(tmp_path / "Stack_0")
    assert "def forward(self, x)" in dump["bytecode/transformed.py"]
    assert "__compiled_fn" in dump["bytecode/transformed.py"]
    assert "LOAD_" in dump["bytecode/transformed.dis.txt"]


def test_a_missing_depyf_is_a_note_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "depyf", None)
    call(compiled(Stack(1), debug_dir=str(tmp_path)))
    assert "pip install 'torch-graphcap[debug]'" in texts(tmp_path / "Stack_0")["bytecode/transformed.py"]


def test_a_failing_depyf_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    depyf = pytest.importorskip("depyf")

    def decompile(code: object) -> str:
        raise NotImplementedError("CACHE")

    monkeypatch.setattr(depyf, "decompile", decompile)
    call(compiled(Stack(1), debug_dir=str(tmp_path)))
    assert "depyf could not decompile it" in texts(tmp_path / "Stack_0")["bytecode/transformed.py"]
