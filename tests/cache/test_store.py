from __future__ import annotations

import errno
import json
import logging
import os
import signal
import stat
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphcap.cache import ArtifactStore, Entry, Miss, PieceKey
from graphcap.cache import store as store_module
from tests.cache.conftest import directory_of, key_for, processes

PAYLOAD = bytes(range(256)) * 3
MANIFEST = {"piece": "piece_3", "seconds": 1.5, "passes": [{"name": "add_rms_norm"}]}


def saved(store: ArtifactStore, key: PieceKey) -> Path:
    assert store.save(key, PAYLOAD, MANIFEST) is None
    return directory_of(store, key)


def reason(found: Entry | Miss) -> str:
    assert isinstance(found, Miss)
    return found.reason


def leftovers(store: ArtifactStore) -> list[str]:
    """Files of writers that did not finish."""
    return [path.name for path in store.root.rglob(".writing-*")]


def test_what_was_saved_is_loaded(store: ArtifactStore, key: PieceKey) -> None:
    assert store.load(key) == Miss("absent")
    saved(store, key)
    assert store.load(key) == Entry(key.digest, PAYLOAD, MANIFEST)
    assert store.load(key_for("another")) == Miss("absent")
    assert leftovers(store) == []


@settings(max_examples=25)
@given(st.binary(max_size=300), st.dictionaries(st.text(), st.integers() | st.text() | st.none()))
def test_any_payload_and_manifest_come_back(payload: bytes, manifest: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as root:
        store = ArtifactStore(Path(root) / "cache")
        assert store.save(key_for(), payload, manifest) is None
        assert store.load(key_for()) == Entry(key_for().digest, payload, manifest)


def test_the_manifest_is_readable_and_names_the_parts_of_the_key(store: ArtifactStore, key: PieceKey) -> None:
    manifest = json.loads((saved(store, key) / "manifest.json").read_text())
    assert manifest["key"] == key.digest
    assert manifest["key_parts"] == key.parts().to_dict()
    assert manifest["about"] == MANIFEST


def test_an_entry_can_be_moved_to_another_root(store: ArtifactStore, key: PieceKey, tmp_path: Path) -> None:
    saved(store, key)
    moved = store.root.rename(tmp_path / "elsewhere")
    assert isinstance(ArtifactStore(moved).load(key), Entry)


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 11, 43, 75, 107, 115, 116, 117, 116 + len(PAYLOAD) - 1])
def test_a_truncated_artifact_is_a_miss_and_quarantined(store: ArtifactStore, key: PieceKey, kept: int) -> None:
    artifact = saved(store, key) / "artifact"
    artifact.write_bytes(artifact.read_bytes()[:kept])
    assert reason(store.load(key)).startswith("damaged")
    assert store.load(key) == Miss("absent")
    assert len(list((store.root / "quarantine").iterdir())) == 1
    saved(store, key)
    assert isinstance(store.load(key), Entry)


@settings(max_examples=60)
@given(st.data())
def test_a_flipped_bit_anywhere_is_a_miss(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as root:
        store = ArtifactStore(Path(root) / "cache")
        file = saved(store, key_for()) / data.draw(st.sampled_from(["artifact", "manifest.json"]))
        content = bytearray(file.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        file.write_bytes(content)
        assert reason(store.load(key_for())).startswith(("damaged", "foreign format"))


def test_appended_bytes_are_damage(store: ArtifactStore, key: PieceKey) -> None:
    with (saved(store, key) / "artifact").open("ab") as file:
        file.write(b"x")
    assert "payload bytes" in reason(store.load(key))


@pytest.mark.parametrize("name", ["artifact", "manifest.json"])
def test_a_missing_file_is_damage(store: ArtifactStore, key: PieceKey, name: str) -> None:
    (saved(store, key) / name).unlink()
    assert reason(store.load(key)) == "damaged: a file of the entry is missing"
    saved(store, key)


def test_an_entry_under_the_wrong_key_is_damage(store: ArtifactStore, key: PieceKey) -> None:
    other = key_for("another")
    wrong = directory_of(store, other)
    wrong.parent.mkdir(exist_ok=True, parents=True)
    saved(store, key).rename(wrong)
    assert reason(store.load(other)) == f"damaged: stored under another key, {key.digest[:12]}"


def test_a_foreign_format_is_a_miss_left_for_its_owner_until_overwritten(store: ArtifactStore, key: PieceKey) -> None:
    artifact = saved(store, key) / "artifact"
    content = artifact.read_bytes()
    artifact.write_bytes(content[:8] + (3).to_bytes(4, "little") + content[12:])
    assert reason(store.load(key)).startswith("foreign format 3")
    assert artifact.exists()
    saved(store, key)
    assert isinstance(store.load(key), Entry)


def test_the_first_of_two_sound_entries_stays(store: ArtifactStore, key: PieceKey) -> None:
    saved(store, key)
    assert store.save(key, b"other", {}) is None
    assert store.load(key) == Entry(key.digest, PAYLOAD, MANIFEST)


def test_everything_written_is_private(store: ArtifactStore, key: PieceKey) -> None:
    previous = os.umask(0)
    try:
        saved(store, key)
        with store.lock(key):
            pass
    finally:
        os.umask(previous)
    for path in [store.root, *store.root.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.parametrize("name", ["artifact", "manifest.json", "."])
@pytest.mark.parametrize("mode", [0o020, 0o002])
def test_what_others_can_write_is_not_read(store: ArtifactStore, key: PieceKey, name: str, mode: int) -> None:
    path = saved(store, key) / name
    path.chmod(path.stat().st_mode | mode)
    assert reason(store.load(key)).startswith("not trusted")
    assert "writable by others" in reason(store.load(key))
    assert path.exists()


def test_a_root_that_others_can_write_is_neither_read_nor_written(store: ArtifactStore, key: PieceKey) -> None:
    saved(store, key)
    store.root.chmod(0o777)
    assert reason(store.load(key)).startswith("not trusted")
    assert str(store.save(key_for("another"), b"", {})).startswith("not trusted")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("name", ["artifact", "."])
def test_what_belongs_to_somebody_else_is_not_read(store: ArtifactStore, key: PieceKey, name: str) -> None:
    os.chown(saved(store, key) / name, 12345, 12345)
    assert "belongs to uid 12345" in reason(store.load(key))


@pytest.mark.parametrize("name", ["artifact", "manifest.json"])
def test_links_are_not_followed(store: ArtifactStore, key: PieceKey, name: str) -> None:
    file = saved(store, key) / name
    file.symlink_to(file.rename(store.root / "elsewhere"))
    assert isinstance(store.load(key), Miss)


def test_the_root_itself_may_be_a_link(tmp_path: Path, key: PieceKey) -> None:
    (tmp_path / "disk").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    saved(ArtifactStore(tmp_path / "link"), key)
    assert isinstance(ArtifactStore(tmp_path / "link").load(key), Entry)


def test_a_pipe_in_place_of_the_artifact_does_not_block(store: ArtifactStore, key: PieceKey) -> None:
    artifact = saved(store, key) / "artifact"
    artifact.unlink()
    os.mkfifo(artifact, 0o600)
    assert "not a regular file" in reason(store.load(key))


def test_a_full_disk_is_a_reason_not_an_error(
    store: ArtifactStore, key: PieceKey, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "graphcap.cache"):
        patch.setattr(store_module, "_write_private", full)
        assert "No space left" in str(store.save(key, PAYLOAD, MANIFEST))
        assert "No space left" in caplog.text
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        assert "No space left" in str(store.save(key, PAYLOAD, MANIFEST))
    assert leftovers(store) == []
    assert store.load(key) == Miss("absent")
    saved(store, key)


def test_a_root_that_cannot_be_created_is_a_reason_not_an_error(tmp_path: Path, key: PieceKey) -> None:
    (tmp_path / "file").write_text("not a directory")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        store = ArtifactStore(root)
        assert store.save(key, PAYLOAD, MANIFEST) is not None
        assert isinstance(store.load(key), Miss)
        assert list(store.entries()) == []


def test_a_manifest_that_is_not_json_is_a_reason_not_an_error(store: ArtifactStore, key: PieceKey) -> None:
    assert "not JSON serializable" in str(store.save(key, PAYLOAD, {"tensor": object()}))
    assert store.load(key) == Miss("absent")


def test_entries_lists_what_is_stored(store: ArtifactStore) -> None:
    keys = [key_for(str(number)) for number in range(3)]
    for key in keys:
        saved(store, key)
    listed = list(store.entries())
    assert [entry.digest for entry in listed] == sorted(key.digest for key in keys)
    assert {entry.size_bytes for entry in listed} == {116 + len(PAYLOAD)}
    assert all((entry.path / "manifest.json").exists() for entry in listed)


def save_many(root: Path, writer: int) -> None:
    store = ArtifactStore(root)
    for number in range(20):
        payload = bytes([writer]) * 50_000
        assert store.save(key_for(str(number % 4)), payload, {"writer": writer}) is None
        found = store.load(key_for(str(number % 4)))
        assert isinstance(found, Entry), found
        assert found.payload == bytes([found.manifest["writer"]]) * 50_000


def test_writers_at_once_leave_whole_entries(store: ArtifactStore) -> None:
    writers = [processes.Process(target=save_many, args=(store.root, number)) for number in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert len(list(store.entries())) == 4
    assert leftovers(store) == []
    assert not (store.root / "quarantine").exists()


def killed_while_writing(root: Path, after: str) -> None:
    """Dies by SIGKILL once the file named ``after`` is half written."""

    def die_half_way(path: Path, content: bytes) -> None:
        path.write_bytes(content if path.name != after else content[: len(content) // 2])
        if path.name == after:
            os.kill(os.getpid(), signal.SIGKILL)

    store_module._write_private = die_half_way
    ArtifactStore(root).save(key_for(), PAYLOAD, MANIFEST)


@pytest.mark.parametrize("after", ["artifact", "manifest.json"])
def test_a_killed_writer_leaves_no_entry(store: ArtifactStore, key: PieceKey, after: str) -> None:
    writer = processes.Process(target=killed_while_writing, args=(store.root, after))
    writer.start()
    writer.join()
    assert writer.exitcode == -signal.SIGKILL
    assert leftovers(store)
    assert store.load(key) == Miss("absent")
    assert list(store.entries()) == []
    saved(store, key)
    assert isinstance(store.load(key), Entry)
