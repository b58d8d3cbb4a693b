"""What the tests of bad input share: a command line that must fail in one line, and a target spoiled in one place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import write_recipe
from fastdraft import cli


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line with which this command line ends: exit code 2, where and found, rule, remedy; no temporary file left."""
    capsys.readouterr()
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as ended:  # argparse
        code = ended.code if isinstance(ended.code, int) else 1
    told = capsys.readouterr().err
    lines = [line for line in told.splitlines() if line.startswith("fastdraft: ")]
    assert code == 2, told
    assert len(lines) == 1, told
    assert told.rstrip().endswith(lines[0]), told
    assert "Traceback" not in told
    assert ";" in lines[0], f"no remedy: {lines[0]}"
    assert len(lines[0]) < 700, lines[0]
    return lines[0]


def everything(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def spoiled(tmp_path: Path, target: Path, change: Callable[[Path], Any]) -> Path:
    """A recipe for a copy of the target in which `change` has spoiled something."""
    folder = tmp_path / "target"
    shutil.copytree(target, folder)
    change(folder)
    return write_recipe(tmp_path, folder)


def config_with(**values: Any) -> Callable[[Path], Any]:
    """Sets keys of config.json; None takes them out."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | values
        (folder / "config.json").write_text(
            json.dumps({k: v for k, v in config.items() if v is not None}), encoding="utf-8"
        )

    return change


def file_with(name: str, content: bytes) -> Callable[[Path], Any]:
    """Replaces a file's content."""
    return lambda folder: (folder / name).write_bytes(content)
