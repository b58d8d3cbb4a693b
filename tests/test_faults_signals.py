"""Faults 32 to 41, signals and terminals: asked to stop, hung up, nobody reading, no room, no characters.

A signal ends in exit code 130 with everything saved; a terminal that is gone or small ends nothing.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import write_recipe
from fastdraft import cli
from fastdraft.console import Console
from fastdraft.training.metrics import Metrics
from faults_fixture import Run, failing, os_error

posix = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")


def signalled(monkeypatch: pytest.MonkeyPatch, number: int, times: int = 1) -> None:
    """Sends this process signals at the second record of a training."""
    real, calls = Metrics.write, iter(range(10**9))

    def write(self: Metrics, **record: Any) -> None:
        real(self, **record)
        if next(calls) == 1:
            for _ in range(times):
                os.kill(os.getpid(), number)

    monkeypatch.setattr(Metrics, "write", write)


def unreadable(number: int, terminal: bool) -> Any:
    """A stderr that takes nothing any more."""
    fails = failing(len, 1, os_error(number))
    return SimpleNamespace(write=fails, flush=fails, fileno=fails, isatty=lambda: terminal)


@posix
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_one_signal_stops_at_the_next_safe_point(
    short_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    run, number = Run(short_run, f"stopped-{name}", "pretrain"), getattr(signal, name)
    signal.signal(
        number, signal.SIG_DFL if name != "SIGINT" else signal.default_int_handler
    )  # a shell may have had it ignored
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        signalled(patch, number)
        assert "progress is saved" in run.fails(capsys, exit_code=130)
    assert signal.getsignal(number) == before
    assert list((run.folder / "pretrain" / "steps").glob("step-*"))
    run.ends_alike()


@posix
def test_two_signals_stop_at_once(
    short_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(short_run, "stopped-twice", "pretrain")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with monkeypatch.context() as patch:
        signalled(patch, signal.SIGINT, times=2)
        assert "run the same command again to go on" in run.fails(capsys, exit_code=130)
    run.ends_alike()


@posix
def test_a_hang_up_that_nohup_ignores_is_ignored(short_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, before = Run(short_run, "nohup", "pretrain"), signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signalled(monkeypatch, signal.SIGHUP)
        assert run.command() == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    run.ends_alike()


@posix
def test_a_stop_is_obeyed_when_the_terminal_has_gone_too(
    short_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(short_run, "gone", "pretrain")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", unreadable(errno.EIO, terminal=False))
        signalled(patch, signal.SIGHUP)
        assert run.command() == 130
    run.ends_alike()


@pytest.mark.parametrize("number", [errno.EIO, errno.EPIPE, errno.ENOSPC])
def test_news_that_nobody_can_read_end_no_work(
    short_run: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    run = Run(short_run, f"unread-{number}", "design")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", unreadable(number, terminal=True))
        assert cli.main(["design", str(short_run), f"run.name={run.name}"]) == 0
    run.ends_alike()


def test_a_reader_that_has_gone_is_no_error() -> None:
    """As in `fastdraft recipes | head -1`."""
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run(
        [sys.executable, "-m", "fastdraft", "recipes"],
        stdout=writing,
        stderr=subprocess.PIPE,
        check=False,
        timeout=120,
    )
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_a_terminal_without_the_characters_gets_escapes(
    tmp_path: Path, tiny_target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "größe-模型-\U0001f98a"
    folder.mkdir()
    recipe = write_recipe(folder, tiny_target)
    narrow = [io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", narrow[0])
    monkeypatch.setattr(sys, "stderr", narrow[1])
    assert cli.main(["check", str(recipe)]) == 0
    assert cli.main(["check", str(recipe), "prepare.corpora[0].path=" + str(folder / "ü.jsonl")]) == 2
    for stream in narrow:
        stream.flush()
    assert b"\\xfc.jsonl" in narrow[1].buffer.getvalue()  # type: ignore[attr-defined]


def test_a_terminal_of_20_columns_is_enough(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setattr(os, "get_terminal_size", lambda descriptor=1: os.terminal_size((20, 5)))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stderr, "fileno", lambda: 2, raising=False)
    with pytest.raises(SystemExit):
        cli.main(["run", "--help"])
    console = Console()
    with console.progress("continue_pretrain", 10**9, "tokens") as progress:
        progress.update(5, "a note that is longer than the whole line")
    console.say("words " * 9)
    console.table("title", ["one column", "another"], [["x" * 30, 1]])
    bars = [
        part
        for part in capsys.readouterr().err.replace("\r", "\n").split("\n")
        if "continue_pretrain" in part
    ]
    assert bars
    assert all(len(bar.removeprefix("\x1b[2K")) <= 20 for bar in bars)
