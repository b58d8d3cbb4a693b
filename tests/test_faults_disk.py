"""Faults 1 to 15, the disk: full, over its quota, broken, read-only, out of handles, at every kind of write of every stage.

Each ends in one line and exit code 2, leaves nothing half-written and nothing of earlier stages touched, and the same command
goes on to the undisturbed result.
"""

from __future__ import annotations

import errno
import importlib
import os
from pathlib import Path

import pytest

from faults_fixture import Run, failing, os_error

FULL, QUOTA, BROKEN, READ_ONLY, HANDLES = errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EMFILE
SAID = {
    FULL: "no space left",
    QUOTA: "quota",
    BROKEN: "failed to read or write",
    READ_ONLY: "read-only",
    HANDLES: "too many open files",
    errno.EACCES: "cannot be read or written",
    errno.ENAMETOOLONG: "too long a name",
}
PLACES = {
    "rename": (os, "replace"),
    "force": (os, "fsync"),
    "write": (Path, "write_bytes"),
    "folder": (Path, "mkdir"),
    "parquet": ("pyarrow.parquet", "write_table"),
    "safetensors": ("fastdraft.training.tensor_files", "save_file"),
    "append": ("fastdraft.training.metrics", "_finite"),
}
"""The calls by which stages write."""


@pytest.mark.parametrize(
    ("stage", "place", "number", "fault"),
    [
        ("design", "rename", 3, FULL),
        ("design", "folder", 1, QUOTA),
        ("design", "force", 4, BROKEN),
        ("prepare", "force", 4, FULL),
        ("prepare", "rename", 5, BROKEN),
        ("prepare", "write", 2, READ_ONLY),
        ("pretrain", "safetensors", 1, FULL),
        ("pretrain", "safetensors", 5, BROKEN),
        ("pretrain", "append", 3, FULL),
        ("pretrain", "rename", 6, QUOTA),
        ("pretrain", "folder", 4, READ_ONLY),
        ("synthesize", "parquet", 1, FULL),
        ("synthesize", "parquet", 3, HANDLES),
        ("synthesize", "force", 5, QUOTA),
        ("align", "rename", 7, BROKEN),
        ("align", "write", 4, errno.EACCES),
        ("evaluate", "parquet", 1, BROKEN),
        ("evaluate", "rename", 4, FULL),
        ("evaluate", "write", 6, errno.ENAMETOOLONG),
        ("export", "rename", 3, READ_ONLY),
        ("export", "force", 3, FULL),
    ],
)
def test_a_disk_that_fails_at_any_kind_of_write_is_one_line_and_the_run_goes_on_later(  # noqa: PLR0917
    short_run: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    place: str,
    number: int,
    fault: int,
) -> None:
    run = Run(short_run, f"disk-{stage}-{place}-{number}", stage)
    owner, name = PLACES[place]
    with monkeypatch.context() as patch:
        where = importlib.import_module(owner) if isinstance(owner, str) else owner
        patch.setattr(where, name, failing(getattr(where, name), number, os_error(fault)))
        assert SAID[fault] in run.fails(capsys)
    run.ends_alike()


def test_a_disk_that_is_full_when_the_page_is_written_is_one_line(
    short_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(short_run, "disk-report", "report")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing(os.replace, 1, os_error(FULL), inside="report.html"))
        assert "report.html: no space left" in run.fails(capsys, "report={}")
    assert run.command("report={}") == 0
    assert "<html" in (run.folder / "report" / "report.html").read_text(encoding="utf-8")
