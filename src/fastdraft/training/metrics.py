"""The record of a training run: a JSON line for each step and validation, and the same to TensorBoard.

with Metrics(folder, step) as metrics: metrics.write(step=1, loss=2.0)
records = read_metrics(folder)
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastdraft.errors import MissingExtra
from fastdraft.run_folder import write_atomic

FILE = "metrics.jsonl"


class Metrics:
    """Appends to `folder/metrics.jsonl`, as if a resumed run had never stopped: lines after `step` go."""

    def __init__(self, folder: Path, step: int, tensorboard: bool = False, silent: bool = False) -> None:
        """`silent`: writes nothing; of all processes of a run only one writes."""
        self._file: Any = None
        self._board: Any = None
        if silent:
            return
        kept = [record for record in read_metrics(folder) if step and record["step"] <= step]
        write_atomic(folder / FILE, "".join(json.dumps(record) + "\n" for record in kept))
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise MissingExtra("tensorboard", "tensorboard") from None
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self._file = open(folder / FILE, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, **record: Any) -> None:
        """One line; `step` is the number of finished steps. Numbers that are not finite become null."""
        if self._file:
            self._file.write(json.dumps(_finite(record)) + "\n")
            self._file.flush()
        if self._board:
            for name, value in _scalars(record):
                self._board.add_scalar(name, value, record["step"])

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *unused: object) -> None:
        for opened in filter(None, (self._file, self._board)):
            opened.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a stage's folder in order; none where it has no file."""
    path, records = folder / FILE, []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):  # the last line, torn by a kill
            records.append(json.loads(line))
    return records


def final_train_loss(records: list[dict[str, Any]], share: float = 0.1) -> float | None:
    """Mean training loss over the last `share` of the recorded steps."""
    losses = [record["loss"] for record in records if record.get("loss") is not None]
    tail = losses[-max(1, round(len(losses) * share)) :]
    return sum(tail) / len(tail) if tail else None


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
