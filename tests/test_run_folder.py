"""The run's folder: complete or not, whose settings, kept results, atomic writes, locks, full disks."""

import errno
import multiprocessing
import os
from pathlib import Path

import pytest

from fastdraft import run_folder
from fastdraft.errors import FastDraftError
from fastdraft.run_folder import (
    RunFolder,
    StageFolder,
    atomic_folder,
    atomic_path,
    digest,
    flatten,
    read_json,
    write_atomic,
    write_json,
)


def test_a_stage_is_complete_only_when_its_manifest_stands(tmp_path: Path) -> None:
    folder = StageFolder(tmp_path / "align")
    folder.begin({"tokens": 5})
    assert not folder.is_complete()
    folder.complete(steps=3)
    assert folder.is_complete()
    assert folder.manifest()["steps"] == 3


def test_work_begun_with_other_settings_is_refused_naming_the_keys_that_changed(tmp_path: Path) -> None:
    folder = StageFolder(tmp_path / "align")
    for _ in range(2):
        folder.begin({"tokens": 5, "optimizer": {"kind": "muon", "learning_rate": 0.1}})
    with pytest.raises(FastDraftError, match=r"optimizer\.learning_rate \(0\.1 -> 0\.2\).*--redo align"):
        folder.begin({"tokens": 5, "optimizer": {"kind": "muon", "learning_rate": 0.2}})


def test_work_of_another_release_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = StageFolder(tmp_path / "align")
    write_json(folder.path / "fingerprint.json", {"tokens": 5})
    with pytest.raises(FastDraftError, match=r"another release.*--redo align"):
        folder.begin({"tokens": 5})


def test_the_digest_of_a_stage_changes_with_its_settings(tmp_path: Path) -> None:
    one, two = StageFolder(tmp_path / "one"), StageFolder(tmp_path / "two")
    one.begin({"tokens": 5})
    two.begin({"tokens": 6})
    assert one.digest() != two.digest()
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})


def test_nested_settings_are_compared_key_by_key() -> None:
    assert flatten({"a": {"b": [1, {"c": 2}]}, "d": []}) == {"a.b[0]": 1, "a.b[1].c": 2, "d": []}


def test_a_kept_result_is_made_once_and_read_ever_after(tmp_path: Path) -> None:
    folder, made = StageFolder(tmp_path), []

    def make() -> dict[int, float]:
        made.append(1)
        return {1: 0.5}

    first = folder.keep("parts/one.json", make)
    assert first == folder.keep("parts/one.json", make) == {"1": 0.5}, "what a resumed run sees, at once"
    assert (len(made), folder.has("parts/one.json"), folder.has("parts/two.json")) == (1, True, False)


def test_a_result_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        StageFolder(tmp_path).keep("number", lambda: 1 / 0)
    assert os.listdir(tmp_path) == []


def test_a_kept_result_that_cannot_be_read_is_named_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text("{")
    with pytest.raises(FastDraftError, match=r"one\.json: unreadable .*; delete it") as raised:
        StageFolder(tmp_path).keep("one.json", dict)
    assert "\n" not in str(raised.value)


def test_a_failed_write_leaves_the_old_file_and_no_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"old": True})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_folder.os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as raised:
        write_atomic(path, b"new")
    assert raised.value.filename == str(path), "pipeline makes one line of it"
    assert read_json(path) == {"old": True}
    assert os.listdir(tmp_path) == ["file.json"]


def test_a_block_that_fails_leaves_neither_file_nor_folder(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "file") as path:
        path.write_text("half")
        raise RuntimeError
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "folder") as path:
        (path / "part").write_text("half")
        raise RuntimeError
    assert os.listdir(tmp_path) == []


def test_a_folder_replaces_the_one_before_whole(tmp_path: Path) -> None:
    for name in ("one", "two"):
        with atomic_folder(tmp_path / "folder") as folder:
            (folder / name).write_text(name)
    assert os.listdir(tmp_path / "folder") == ["two"]


def _try_lock(root: str, queue: "multiprocessing.Queue[str]") -> None:
    try:
        with RunFolder(Path(root)).lock():
            queue.put("locked")
    except FastDraftError as error:
        queue.put(str(error))


def test_one_process_at_a_time_owns_a_run(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    with RunFolder(tmp_path).lock():
        process = context.Process(target=_try_lock, args=(str(tmp_path), queue))
        process.start()
        assert "in use by another process" in queue.get(timeout=60)
        process.join()
    with RunFolder(tmp_path).lock():
        pass


def test_discarding_removes_all_and_what_only_unfinished_work_needs_goes_at_its_end(tmp_path: Path) -> None:
    folder = StageFolder(tmp_path / "x")
    folder.begin({})
    (folder.path / "steps" / "step-1").mkdir(parents=True)
    folder.complete()
    folder.remove_scratch()
    assert sorted(os.listdir(folder.path)) == ["fingerprint.json", "manifest.json"]
    folder.discard()
    assert not folder.path.exists()


def test_what_killed_processes_left_half_written_is_removed_under_the_lock(tmp_path: Path) -> None:
    folder = tmp_path / "align"
    (folder / ".checkpoint.4711.tmp" / "inner").mkdir(parents=True)
    for half in (".checkpoint.4711.tmp/.part.4711.tmp", ".unit-00001.parquet.12.tmp"):
        (folder / half).write_text("half")
    kept = [folder / name for name in ("checkpoint.tmp", ".hidden", ".checkpoint.x.tmp", "a.12.tmp")]
    for path in kept:
        path.write_text("whole")
    with RunFolder(tmp_path).lock():
        pass
    assert sorted(folder.iterdir()) == sorted(kept)
