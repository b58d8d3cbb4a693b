"""What the tests of faults share: a run up to a stage, a fault put in its way, the one line that must come, and the result after it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastdraft import cli
from fastdraft.pipeline import STAGE_NAMES
from test_every_write import copy_without, differing, result


class Run:
    """A copy of the finished short run as it was before one stage began.

    Args:
        recipe: Of the finished run.
        name: Of the copy.
        stage: Not yet begun.
    """

    def __init__(self, recipe: Path, name: str, stage: str) -> None:
        self.recipe, self.name, self.stage = recipe, name, stage
        self.finished, self.folder = recipe.parent / "runs" / "tiny", recipe.parent / "runs" / name
        copy_without(self.finished, self.folder, stage)

    def command(self, *more: str) -> int:
        """The stage's verb; returns the exit code."""
        return cli.main([self.stage, str(self.recipe), f"run.name={self.name}", "--quiet", *more])

    def fails(self, capsys: pytest.CaptureFixture[str], *more: str, exit_code: int = 2) -> str:
        """The one line with which the command ends; nothing half-written may be left, and no earlier stage touched."""
        capsys.readouterr()
        assert self.command(*more) == exit_code
        line = one_line(capsys)
        assert [str(path) for path in self.folder.rglob("*.tmp")] == []
        assert not (self.folder / self.stage / "manifest.json").exists()
        for earlier in STAGE_NAMES[: STAGE_NAMES.index(self.stage)]:
            assert differing(result(self.folder / earlier), result(self.finished / earlier)) == []
        return line

    def ends_alike(self) -> None:
        """The same command once more gives the undisturbed result."""
        assert self.command() == 0
        assert differing(result(self.folder / self.stage), result(self.finished / self.stage)) == []
        shutil.rmtree(self.folder)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line of stderr, which must be the only one of an error."""
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("fastdraft: ")]
    assert len(lines) == 1, err
    assert err.rstrip().endswith(lines[0])
    assert "Traceback" not in err
    return lines[0]


def failing(
    real: Callable[..., Any], number: int, error: Callable[[], BaseException], inside: str = ""
) -> Callable[..., Any]:
    """`real`, but call `number` (from 1) and all after it raise; only calls whose arguments name `inside` count."""
    calls = 0

    def call(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        if not inside or any(inside in os.fspath(a) for a in arguments if isinstance(a, (str, os.PathLike))):
            calls += 1
            if calls >= number:
                raise error()
        return real(*arguments, **named)

    return call


def os_error(number: int) -> Callable[[], OSError]:
    """Makes the error that the operating system would."""
    return lambda: OSError(number, os.strerror(number))
