"""Where a piece's code comes from: a twin, the cache, Inductor; and what happens when one of them fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from graphcap.compiler import inductor, region
from graphcap.compiler.backend import graphcap
from graphcap.compiler.eager_functions import eager
from graphcap.compiler.region import PieceRecord

REPOSITORY = Path(__file__).parents[2]


@eager
def live(x: Tensor) -> Tensor:
    return x * 3


def model(x: Tensor) -> Tensor:
    """Two distinct pieces, the first of them twice."""
    return live(live(x.sin() + 1).sin() + 1).cos() * 2


def run(**options: Any) -> list[PieceRecord]:
    """Compile ``model`` as a new process would, check its result, and return the records of its pieces."""
    torch._dynamo.reset()
    region.forget_regions()
    compiled, x = torch.compile(model, backend=graphcap, options=options), torch.linspace(-1, 1, 12)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    (only,) = region.all_regions()
    assert not only.bypass
    return [piece for piece in only.pieces if piece.kind == "captured"]


def origins(pieces: Sequence[PieceRecord]) -> list[str]:
    return [piece.origin if piece.twin_of is None else "twin" for piece in pieces]


def cache_folder() -> Path:
    return Path(os.environ["GRAPHCAP_CACHE_DIR"])


@pytest.mark.slow
def test_each_distinct_piece_is_compiled_once_then_comes_from_the_cache() -> None:
    cold = run()
    assert origins(cold) == ["compiled", "twin", "compiled"]
    assert cold[0].key == cold[1].key != cold[2].key
    warm = run()
    assert origins(warm) == ["cache", "twin", "cache"]
    assert [piece.key for piece in warm] == [piece.key for piece in cold]


@pytest.mark.slow
def test_cache_false_touches_no_disk() -> None:
    assert origins(run(cache=False)) == ["compiled", "twin", "compiled"]
    assert not cache_folder().exists()


@pytest.mark.slow
def test_a_setting_that_reaches_the_code_is_another_key() -> None:
    first = run()
    other = run(inductor_compile_config={"epilogue_fusion": False})
    assert origins(other) == ["compiled", "twin", "compiled"]
    assert other[0].key != first[0].key


@pytest.mark.slow
@pytest.mark.parametrize("damage", [b"", b"\x00" * 400, None], ids=["empty", "zeros", "one bit"])
def test_a_damaged_entry_is_a_miss_and_is_replaced(damage: bytes | None) -> None:
    run()
    for artifact in cache_folder().rglob("artifact"):
        content = bytearray(artifact.read_bytes())
        content[-10] ^= 1
        artifact.write_bytes(content if damage is None else damage)
    again = run()
    assert origins(again) == ["compiled", "twin", "compiled"]
    assert "damaged" in again[0].note
    assert origins(run()) == ["cache", "twin", "cache"]


@pytest.mark.slow
def test_an_entry_that_cannot_be_loaded_is_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    run()

    def refuse(*_: Any) -> Any:
        raise RuntimeError("made by another torch")

    monkeypatch.setattr(inductor, "unpack", refuse)
    again = run()
    assert origins(again) == ["compiled", "twin", "compiled"]
    assert "made by another torch" in again[0].note


@pytest.mark.slow
def test_an_unwritable_cache_costs_the_cache_only(tmp_path: Path) -> None:
    occupied = tmp_path / "a file"
    occupied.write_text("not a directory")
    for _ in range(2):
        pieces = run(cache_dir=str(occupied))
        assert origins(pieces) == ["compiled", "twin", "compiled"]
        assert "not stored" in pieces[0].note


@pytest.mark.slow
def test_a_full_disk_costs_the_cache_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphcap.cache import store

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "_write_private", full)
    pieces = run()
    assert origins(pieces) == ["compiled", "twin", "compiled"]
    assert "No space left" in pieces[0].note


def test_a_piece_that_inductor_cannot_compile_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("no lowering for this")

    monkeypatch.setattr(inductor.private, "standalone_compile", broken)
    with caplog.at_level("WARNING", logger="graphcap"):
        pieces = run()
    assert origins(pieces) == ["failed", "twin", "failed"]
    assert pieces[0].note == "NotImplementedError: no lowering for this"
    assert len([record for record in caplog.records if "runs as it is" in record.message]) == 2


def test_compiler_eager_compiles_nothing_and_touches_no_disk() -> None:
    assert origins(run(compiler="eager")) == ["eager", "twin", "eager"]
    assert not cache_folder().exists()


PROGRAM = """
import json, sys, torch
sys.path.insert(0, {repository!r})
from tests.compiler import test_pieces
print(json.dumps(test_pieces.origins(test_pieces.run())))
"""


def start(environment: dict[str, str]) -> subprocess.Popen[str]:
    program = PROGRAM.format(repository=str(REPOSITORY))
    command = [sys.executable, "-c", program]
    return subprocess.Popen(
        command, env={**os.environ, **environment}, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str]) -> list[str]:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    found = json.loads(output.splitlines()[-1])
    assert isinstance(found, list)
    return found


@pytest.mark.slow
def test_a_second_process_hits_for_every_piece() -> None:
    assert finish(start({})) == ["compiled", "twin", "compiled"]
    assert finish(start({})) == ["cache", "twin", "cache"]


@pytest.mark.slow
def test_two_processes_at_once_on_an_empty_cache_compile_each_piece_once() -> None:
    both = [start({}), start({})]
    found = [finish(process) for process in both]
    for index in (0, 2):
        assert sorted(origins[index] for origins in found) == ["cache", "compiled"]
