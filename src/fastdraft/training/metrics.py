"""The record of a training run: one JSON line per step and per validation, and the same to TensorBoard when asked.

Decides that a resumed run continues the file as if it had never stopped: lines after the checkpoint's step are cut away first.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from fastdraft.errors import MissingExtra
from fastdraft.machine import disk_errors
from fastdraft.run_folder import write_atomic

FILE = "metrics.jsonl"


class Metrics:
    """Appends records to `folder/metrics.jsonl`; use as a context manager.

    Args:
        folder: the stage's folder.
        step: the last step that is already done; later lines are removed.
        tensorboard: write `folder/tensorboard/` too.
        silent: write nothing; of all processes of a run only one writes.

    Raises:
        MissingExtra: TensorBoard asked for but not installed.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool = False, silent: bool = False) -> None:
        self.path = folder / FILE
        self._board: Any = None
        self._file: TextIO | None = None
        if silent:
            return
        kept = [json.dumps(record) for record in read_metrics(folder) if record["step"] <= step]
        if step or self.path.exists():
            write_atomic(self.path, "".join(line + "\n" for line in kept) if step else "")
        self._board = _open_board(folder / "tensorboard", step) if tensorboard else None
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, **record: Any) -> None:
        """One line; `step` is the number of finished steps. Numbers that are not finite become null."""
        if self._file is None:
            return
        with disk_errors(self.path):
            self._file.write(json.dumps({key: _finite(value) for key, value in record.items()}) + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in _scalars(record):
                self._board.add_scalar(name, value, record["step"])

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *unused: object) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a stage's folder in order; a line torn by a kill, or that is no record of a step, is left out. No file: none."""
    path = folder / FILE
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and type(record.get("step")) is int:
            records.append(record)
    return records


def _open_board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingExtra("tensorboard", "tensorboard") from None
    return SummaryWriter(str(folder), purge_step=step + 1)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and name != "step":
            yield prefix + name, float(value)
