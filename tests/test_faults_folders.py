"""Faults 16 to 31, what others do to a run's folders: move and delete them, hold them, fill them, turn the clock.

Each ends in one line and exit code 2, or is borne; nothing is lost, and the same command goes on to the undisturbed result.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from conftest import write_recipe
from fastdraft import cli, run_folder
from fastdraft.data import journal
from fastdraft.errors import FastDraftError
from fastdraft.run_folder import RunFolder, StageFolder
from fastdraft.stages import synthesize
from fastdraft.training.metrics import Metrics, read_metrics
from faults_fixture import Run, failing, one_line, os_error


def moving(real: Callable[..., Any], number: int, source: Path, goal: Path) -> Callable[..., Any]:
    """`real`, but before call `number` somebody moves the run away."""
    calls = 0

    def call(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            source.rename(goal)
        return real(*arguments, **named)

    return call


@pytest.mark.parametrize(
    ("stage", "owner", "name"), [("synthesize", synthesize, "write_rows"), ("pretrain", Metrics, "write")]
)
def test_a_run_moved_away_while_it_works_is_not_begun_anew_in_its_place(  # noqa: PLR0917
    short_run: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    stage: str,
    owner: Any,
    name: str,
) -> None:
    run, away = Run(short_run, f"moved-{stage}", stage), tmp_path / "away"
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, moving(getattr(owner, name), 2, run.folder, away))
        assert run.command() == 2
    assert "is gone" in one_line(capsys)
    assert not run.folder.exists()
    away.rename(run.folder)
    run.ends_alike()


@pytest.mark.parametrize(
    ("stage", "file"),
    [
        ("pretrain", "design/draft/config.json"),
        ("pretrain", "prepare/text/train-00000.bin"),
        ("align", "synthesize/units/unit-00000.parquet"),
        ("evaluate", "align/checkpoint/model.safetensors"),
        ("export", "align/checkpoint/tokenizer.json"),
    ],
)
def test_a_file_deleted_from_a_finished_stage_is_named_by_the_next_one(
    short_run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, stage: str, file: str
) -> None:
    run = Run(short_run, f"deleted-{stage}-{Path(file).stem}", stage)
    (run.folder / file).rename(tmp_path / "kept")
    assert run.command() == 2
    line = one_line(capsys)
    assert any(part in line for part in (file, Path(file).name, str(Path(file).parent)))
    assert not (run.folder / stage / "manifest.json").exists()
    (tmp_path / "kept").rename(run.folder / file)
    if stage == "align":
        run.ends_alike()


def test_a_corpus_that_changed_under_its_shards_is_refused_and_one_that_is_gone_is_missed_by_prepare_alone(
    short_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, corpus = Run(short_run, "corpus", "pretrain"), short_run.parent / "text.jsonl"
    before = corpus.read_bytes()
    try:
        corpus.write_bytes(before + b'{"text": "one more"}\n')
        assert run.command() == 2
        assert "prepare" in (line := one_line(capsys))
        assert "--redo prepare" in line
        corpus.unlink()
        assert run.command() == 0
        shutil.rmtree(run.folder)
        anew = Run(short_run, "corpus", "prepare")
        assert "text.jsonl" in anew.fails(capsys)
    finally:
        corpus.write_bytes(before)


def test_a_target_that_is_gone_between_two_stages_is_one_line(
    tmp_path: Path, tiny_target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, away = tmp_path / "target", tmp_path / "away"
    shutil.copytree(tiny_target, target)
    recipe = str(write_recipe(tmp_path, target))
    assert cli.main(["design", recipe, "--quiet"]) == 0
    target.rename(away)
    assert cli.main(["prepare", recipe, "--quiet"]) == 2
    assert "no such directory" in one_line(capsys)
    away.rename(target)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    (target / "config.json").write_text(
        json.dumps(config | {"hidden_size": 64, "intermediate_size": 8}), encoding="utf-8"
    )
    assert cli.main(["prepare", recipe, "--quiet"]) == 2
    assert "design" in one_line(capsys)


def test_no_temporary_folder_no_home_and_no_working_directory(
    short_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run, nowhere = Run(short_run, "homeless", "design"), tmp_path / "nowhere"
    monkeypatch.setattr(tempfile, "tempdir", str(nowhere))
    assert str(nowhere) in run.fails(capsys)
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(
        Path, "home", failing(Path.home, 1, lambda: RuntimeError("Could not determine home directory."))
    )
    nowhere.mkdir()
    monkeypatch.chdir(nowhere)
    nowhere.rmdir()
    assert cli.main(["design", str(short_run), "run.folder=runs", "--quiet"]) == 2
    assert "no folder can be made here" in one_line(capsys)
    run.ends_alike()
    os.chdir(tmp_path)


def test_a_full_database_is_one_line(
    short_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, real = Run(short_run, "database", "prepare"), journal.Journal.add

    def more_than_fits(self: journal.Journal, digests: Iterable[bytes]) -> None:
        self._database.execute("PRAGMA max_page_count = 1")  # no page beyond those that it has
        real(self, [*digests, bytes(100_000)])

    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "add", more_than_fits)
        assert "full" in run.fails(capsys)
    run.ends_alike()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_lock_that_cannot_be_made_is_one_line(
    short_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    run = Run(short_run, f"lock-{number}", "design")
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", failing(os.open, 1, os_error(number), inside=".lock"))
        run.fails(capsys)
    run.ends_alike()


def test_a_second_run_with_redo_throws_nothing_away_while_the_first_works(
    short_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(short_run, "both", "export")
    with RunFolder(run.folder).lock():
        assert cli.main(["run", str(short_run), "run.name=both", "--redo", "design"]) == 2
    assert "in use by another process" in one_line(capsys)
    assert (run.folder / "evaluate" / "manifest.json").is_file()
    run.ends_alike()


def test_a_lock_that_a_dead_process_left_does_not_block(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("4194305\nelsewhere\n", encoding="utf-8")
    with RunFolder(tmp_path).lock():
        pass


@pytest.mark.skipif(os.name != "posix", reason="locks of POSIX")
def test_where_the_file_server_knows_no_locks_a_file_stands_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    monkeypatch.setattr(fcntl, "flock", failing(fcntl.flock, 1, os_error(errno.ENOLCK)))
    marker, run, here = tmp_path / ".lock.held", RunFolder(tmp_path), socket.gethostname()
    with run.lock(), pytest.raises(FastDraftError, match=r"in use.*delete .*\.lock\.held"), run.lock():
        pass
    assert not marker.exists()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    marker.write_text(f"{dead.pid}\n{here}\n", encoding="utf-8")
    with run.lock():
        pass
    for owner in (f"{os.getppid()}\n{here}\n", f"{dead.pid}\nanother-machine\n"):
        marker.write_text(owner, encoding="utf-8")
        with pytest.raises(FastDraftError, match="in use"), run.lock():
            pass


def test_a_clock_that_jumps_back_a_year_changes_nothing(
    short_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, real, looks = Run(short_run, "clock", "pretrain"), time.time, iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: real() - 3.15e7 * next(looks))
    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "write", failing(Metrics.write, 5, os_error(errno.EIO)))
        run.fails(capsys)
    for number, path in enumerate(sorted(run.folder.rglob("*"))):
        os.utime(path, (real() + 3.15e7 * (number % 3 - 1),) * 2)
    assert run.command() == 0
    assert all(record.get("tokens_per_second", 0) >= 0 for record in read_metrics(run.folder / "pretrain"))
    assert min(json.loads((run.folder / "timings.json").read_text(encoding="utf-8")).values()) >= 0
    run.ends_alike()


def test_work_without_a_fingerprint_belongs_to_no_recipe(
    short_run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = Run(short_run, "orphan", "export")
    fingerprint = run.folder / "evaluate" / "fingerprint.json"
    fingerprint.rename(tmp_path / "kept")
    (run.folder / "evaluate" / "manifest.json").unlink()
    assert (
        cli.main(["evaluate", str(short_run), "run.name=orphan", "evaluate.temperatures=[0]", "--quiet"]) == 2
    )
    assert "fingerprint.json is missing" in one_line(capsys)
    (tmp_path / "kept").rename(fingerprint)
    run.stage = "evaluate"
    run.ends_alike()


def test_a_kill_while_work_is_thrown_away_leaves_no_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = StageFolder(tmp_path / "synthesize")
    artifact.begin({"seed": 0})
    (artifact.path / "units").mkdir()
    (artifact.path / "units" / "unit-00000.parquet").write_bytes(b"rows of seed 0")
    artifact.complete()
    with monkeypatch.context() as patch:
        patch.setattr(run_folder.shutil, "rmtree", failing(shutil.rmtree, 2, KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            artifact.discard()
    assert not artifact.path.exists()
    with RunFolder(tmp_path).lock():
        artifact.begin({"seed": 1})
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != ".lock") == ["synthesize"]
    assert [path.name for path in artifact.path.iterdir()] == ["fingerprint.json"]


@pytest.mark.parametrize("release", ["newer schema", "other versions"])
def test_work_of_another_release_is_taken_where_it_can_be_read(
    short_run: Path, capsys: pytest.CaptureFixture[str], release: str
) -> None:
    run = Run(short_run, f"release-{release[:5]}", "pretrain")
    path = run.folder / "prepare" / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if release == "other versions":
        manifest["provenance"]["libraries"] = {"fastdraft": "99.0", "torch": "1.0"}
        path.write_text(json.dumps(manifest), encoding="utf-8")
        assert run.command() == 0
        return
    path.write_text(json.dumps(manifest | {"schema": 2}), encoding="utf-8")
    assert run.command() == 2
    assert "newer release" in one_line(capsys)


def test_a_name_that_is_no_unicode_can_be_written_and_read(tmp_path: Path) -> None:
    value = {"path": os.fsdecode(b"corpus-\xff.txt"), "text": "half a pair: \ud83d", "emoji": "\U0001f98a"}
    run_folder.write_json(tmp_path / "facts.json", value)
    assert run_folder.read_json(tmp_path / "facts.json") == value
