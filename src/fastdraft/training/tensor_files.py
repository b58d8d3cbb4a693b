"""The tensor files of a checkpoint: one of each kind where every process holds everything, else one of each kind for each process.

Decides the names (`model-00001-of-00004.safetensors` is the second of four), that each process writes the rows that it holds and no
others, and that the JSON which is written last says which rows lie where. So any number of processes goes on from the parts of
any other number, each reading the rows that it will hold. No pickle: torch.distributed.checkpoint's index is one.
"""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastdraft.errors import FastDraftError
from fastdraft.run_folder import file_sha256
from fastdraft.training.sharding import from_rows, held_rows, local

RANDOM, STATE = "random.safetensors", "state.json"
_NAME = re.compile(r"(model|optimizer)(-\d{5}-of-\d{5})?\.safetensors|random\.safetensors")
_WINDOWS_DISK_FULL = 112


def file_name(kind: str, rank: int = 0, size: int = 1) -> str:
    """The file of a kind (`model`, `optimizer`) that a process writes."""
    return f"{kind}.safetensors" if size == 1 else f"{kind}-{rank:05d}-of-{size:05d}.safetensors"


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raises:
    OSError: with the system's error number, which safetensors hides in its text.
    """
    try:
        save_file(
            {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()},
            path,
        )
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        full = number and int(number[1]) in (errno.ENOSPC, _WINDOWS_DISK_FULL)
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error), str(path)) from error


def write_part(
    folder: Path, kind: str, tensors: Mapping[str, Tensor], rank: int, size: int
) -> dict[str, Any]:
    """Writes what this process holds of tensors in parts; process 0 also those that are whole everywhere (AdamW's step counts).

    Returns:
        The file's checksum, and shape and held rows (`[first, behind the last]`, None: whole) of each tensor, as JSON values.
    """
    held = {name: held_rows(tensor) for name, tensor in tensors.items()}
    own = {
        name: local(tensor)
        for name, tensor in tensors.items()
        if (held[name] is None and rank == 0) or _some(held[name])
    }
    name = file_name(kind, rank, size)
    write_tensors(own, folder / name)
    rows = {key: None if span is None else list(span) for key, span in held.items()}
    return {
        "files": describe_files(folder, [name]),
        "shapes": {key: list(tensor.shape) for key, tensor in tensors.items()},
        "rows": rows,
    }


def _some(span: tuple[int, int] | None) -> bool:
    return span is not None and span[1] > span[0]


def layout(records: list[dict[str, Any]]) -> dict[str, Any]:
    """What all processes' `write_part` returned, by tensor: its shape, and by process the rows that lie in that one's file."""
    return {
        name: {
            "shape": shape,
            "rows": None
            if records[0]["rows"][name] is None
            else [record["rows"][name] for record in records],
        }
        for name, shape in records[0]["shapes"].items()
    }


class StoredTensors:
    """The tensors of one kind in a checkpoint's folder, whoever wrote them; open inside its `with` block.

    Args:
        folder: The checkpoint.
        kind: `model` or `optimizer`.
        record: Its JSON; the files must have been checked.

    Raises:
        ValueError, LookupError, TypeError: for a JSON that does not say where each row lies.
    """

    def __init__(self, folder: Path, kind: str, record: Mapping[str, Any]) -> None:
        parts = record.get("parts")
        self._layout: dict[str, Any] | None = parts[kind] if parts else None
        self._files = (
            [file_name(kind, rank, parts["size"]) for rank in range(parts["size"])]
            if parts
            else [file_name(kind)]
        )
        if missing := set(self._files) - set(record["files"]):
            raise ValueError(f"{min(missing)} is not listed")
        for name, entry in (self._layout or {}).items():
            _check_spans(name, entry)
        self._folder, self._open, self._stack = folder, list[Any](), contextlib.ExitStack()

    def __enter__(self) -> StoredTensors:
        self._open = [
            self._stack.enter_context(safe_open(self._folder / name, framework="pt")) for name in self._files
        ]
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def keys(self) -> set[str]:
        return set(self._open[0].keys() if self._layout is None else self._layout)

    def like(self, name: str, tensor: Tensor) -> Tensor:
        """What is stored, on the tensor's device: this process's rows, in parts as `tensor` is, or all of it where that is whole.

        Of another shape than `tensor` (a step count), it is whole.
        """
        held, shape = held_rows(tensor), self.shape(name)
        if held is None or shape != list(tensor.shape):
            rows = shape[0] if shape else 0
            return self.rows(name, 0, rows).to(tensor.device)
        return from_rows(tensor, self.rows(name, *held))

    def rows(self, name: str, first: int, behind: int) -> Tensor:
        """Rows `first` to `behind - 1`, of however many files; a tensor without rows as it is."""
        spans = self._layout[name]["rows"] if self._layout is not None else None
        if spans is None:
            whole = self._open[0].get_slice(name)
            found: Tensor = whole[first:behind] if whole.get_shape() else self._open[0].get_tensor(name)
            return found
        pieces: list[Tensor] = []
        for file, (start, stop) in zip(self._open, spans, strict=True):
            if max(first, start) < min(behind, stop):
                pieces.append(file.get_slice(name)[max(first, start) - start : min(behind, stop) - start])
        if not pieces:  # more processes than rows
            file = next(file for file, (start, stop) in zip(self._open, spans, strict=True) if start < stop)
            pieces = [file.get_slice(name)[0:0]]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def shape(self, name: str) -> list[int]:
        """That of the whole tensor."""
        return list(
            self._open[0].get_slice(name).get_shape() if self._layout is None else self._layout[name]["shape"]
        )


def _check_spans(name: str, entry: Mapping[str, Any]) -> None:
    """The rows of all files, in order, are all rows."""
    shape, spans = entry["shape"], entry["rows"]
    if spans is None:
        return
    ends = [0, *(stop for _, stop in spans)]
    if (
        any(start != before or stop < start for (start, stop), before in zip(spans, ends[:-1], strict=True))
        or ends[-1] != shape[0]
    ):
        raise ValueError(f"{name} is not all there")


def describe_files(folder: Path, names: Iterable[str]) -> dict[str, Any]:
    """Size and checksum of each."""
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}
        for name in names
    }


def check_files(folder: Path, record: Any) -> None:
    """Raises:
    FastDraftError: when a file is missing or is not the one that was written.
    """
    files = record.get("files") if isinstance(record, dict) else None
    if (
        not isinstance(files, dict)
        or not all(_NAME.fullmatch(name) for name in files)
        or not any("model" in name for name in files)
    ):
        raise FastDraftError(
            folder / STATE, "lists no files", "must name each file with its checksum", "delete this folder"
        )
    for name, expected in files.items():
        path = folder / name
        if not isinstance(expected, dict) or not {"bytes", "sha256"} <= expected.keys():
            raise FastDraftError(
                folder / STATE,
                f"no checksum of {name}",
                "must name each file with its checksum",
                "delete this folder",
            )
        if (
            not path.is_file()
            or path.stat().st_size != expected["bytes"]
            or file_sha256(path) != expected["sha256"]
        ):
            raise FastDraftError(
                path, "damaged or missing", "must have the checksum written with it", "delete this folder"
            )
