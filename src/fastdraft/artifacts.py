"""The run directory: what a stage leaves behind, when it counts as finished, and whose recipe it belongs to.

Decides that an artifact is a folder whose `manifest.json` is written last; that every file is written to a temporary
name and renamed; that a stage's fingerprint (just the settings and inputs that it depends on) is written first, so a
changed recipe over existing work is refused with the keys that changed; and that one process at a time owns a run.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdraft.errors import ArtifactError, DiskError

_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")
"""What the three functions below call an unfinished file or folder."""
MANIFEST, FINGERPRINT, SCHEMA = "manifest.json", "fingerprint.json", 1
SCRATCH = ("steps", ".journal", "converted")
"""Folders of resume checkpoints, journals and converted copies of the target, of no use once a stage is complete."""


def write_atomic(path: Path, content: bytes | str) -> None:
    """Writes the whole file under a temporary name, forces it to disk, then renames it over `path`.

    Raises:
        DiskError: when the disk is full or the folder cannot be written.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path` for a library to write to; renamed over `path` when the block succeeds."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields an empty temporary folder beside `path`; it takes the place of `path` when the block succeeds."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            if path.exists():
                shutil.rmtree(path)
            os.replace(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def disk_errors(path: Path | str) -> Iterator[None]:
    """Turns "no space left", "read-only" and "permission denied" into one line for the user."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskError(
                path, "no space left on the disk", "this file must fit", "free some space and run the same command again"
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise DiskError(
                path, "cannot be written", "the run's folder must be writable", "change its rights or set run.folder"
            ) from error
        raise


def write_json(path: Path, value: object) -> None:
    """Pretty JSON, keys in the order given, written atomically."""
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        ArtifactError: when the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(path, "missing", "this file must exist", "run the stage that writes it") from None
    except (ValueError, RecursionError, OSError) as error:
        raise ArtifactError(path, f"unreadable ({error})", "must be valid JSON", "delete this folder and run its stage again") from None


def file_sha256(path: Path) -> str:
    """Hex digest of a file's content, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: object) -> str:
    """A short stable digest of a JSON-able value (20 hex digits of sha256 over its sorted JSON)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:20]


def flatten(value: Mapping[str, Any] | list[Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted keys, so that two fingerprints can be compared key by key."""
    items = value.items() if isinstance(value, Mapping) else ((f"[{i}]", v) for i, v in enumerate(value))
    flat: dict[str, Any] = {}
    for key, item in items:
        name = f"{prefix}{key}" if not prefix or str(key).startswith("[") else f"{prefix}.{key}"
        flat.update(flatten(item, name) if isinstance(item, (Mapping, list)) and item else {name: item})
    return flat


class _Fields(dict[str, Any]):
    """A manifest's fields: one that is asked for and missing is the file's fault, told in one line."""

    def __init__(self, path: Path, fields: Mapping[str, Any]) -> None:
        super().__init__(fields)
        self._path = path

    def __missing__(self, key: str) -> Any:
        raise ArtifactError(self._path, f"no '{key}'", "must hold what its stage wrote", "delete this folder and run its stage again")


@dataclass(frozen=True)
class Artifact:
    """One stage's folder: complete when its manifest stands."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    def is_complete(self) -> bool:
        return (self.path / MANIFEST).is_file()

    def manifest(self) -> dict[str, Any]:
        """What the stage wrote about its result; at least `schema`, `stage` and `fingerprint`.

        Raises:
            ArtifactError: when the stage is not finished or the manifest is damaged.
        """
        value = read_json(self.path / MANIFEST)
        if not isinstance(value, dict) or value.get("schema") != SCHEMA:
            raise ArtifactError(
                self.path / MANIFEST, "another schema", f"must be schema {SCHEMA}", "delete this folder and run its stage again"
            )
        return _Fields(self.path / MANIFEST, value)

    def digest(self) -> str:
        """Stands for this artifact in the fingerprints of the stages after it."""
        return digest(self.stored_fingerprint())

    def stored_fingerprint(self) -> dict[str, Any]:
        value = read_json(self.path / FINGERPRINT)
        if not isinstance(value, dict):
            raise ArtifactError(
                self.path / FINGERPRINT, "not a mapping", "must hold the stage's settings", "delete this folder and run its stage again"
            )
        return value

    def differences(self, fingerprint: Mapping[str, Any]) -> list[str]:
        """The keys, with both values, in which existing work differs from `fingerprint`; empty for none or no work yet."""
        if not (self.path / FINGERPRINT).exists():
            return []
        try:
            old = flatten(self.stored_fingerprint())
        except RecursionError:
            rule, remedy = "must hold the stage's settings", "delete this folder and run its stage again"
            raise ArtifactError(self.path / FINGERPRINT, "nested too deeply", rule, remedy) from None
        new = flatten(json.loads(json.dumps(fingerprint, default=str)))
        return [
            f"{key} ({old.get(key, 'unset')} -> {new.get(key, 'unset')})" for key in sorted({*old, *new}) if old.get(key) != new.get(key)
        ]

    def begin(self, fingerprint: Mapping[str, Any]) -> None:
        """Claims the folder for these settings, or goes on with work begun under the same ones.

        Raises:
            ArtifactError: when the folder holds work begun under other settings.
        """
        changed = self.differences(fingerprint)
        if changed:
            raise ArtifactError(
                self.path,
                "; ".join(changed[:4]),
                "this work was done with other settings",
                f"use another run.name, or redo it with --redo {self.name}",
            )
        if not (self.path / FINGERPRINT).exists():
            write_json(self.path / FINGERPRINT, fingerprint)

    def complete(self, **fields: Any) -> None:
        """Writes the manifest: from here on the stage counts as finished."""
        write_json(self.path / MANIFEST, {"schema": SCHEMA, "stage": self.name, "fingerprint": self.digest(), **fields})

    def remove_scratch(self) -> None:
        """Removes what only an unfinished stage needs; a kill right after the manifest may have left it."""
        for name in SCRATCH:
            shutil.rmtree(self.path / name, ignore_errors=True)

    def discard(self) -> None:
        """Removes the stage's work, the manifest first, so that a kill half-way leaves it unfinished."""
        (self.path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)


@dataclass(frozen=True)
class RunDirectory:
    """`runs/NAME`: one folder for each stage."""

    root: Path

    def artifact(self, name: str) -> Artifact:
        return Artifact(self.root / name)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the run for this process; the operating system lets go when the process dies.

        What killed processes left half-written is removed: nobody else writes here while the lock is held.

        Raises:
            ArtifactError: when another process holds it. DiskError: when the folder cannot be made or written.
        """
        from filelock import FileLock, Timeout

        with disk_errors(self.root):
            try:
                self.root.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError, FileNotFoundError):
                rule = "the run's folder must be one that can be made"
                raise DiskError(self.root, "no folder can be made here", rule, "set another run.folder") from None
            lock = FileLock(str(self.root / ".lock"), timeout=0)
            try:
                lock.acquire()
            except Timeout:
                raise ArtifactError(
                    self.root, "in use by another process", "one process at a time may write a run", "wait for it, or use another run.name"
                ) from None
        try:
            self._remove_unfinished()
            yield
        finally:
            lock.release()

    def _remove_unfinished(self) -> None:
        for folder, folders, files in os.walk(self.root):
            for name in filter(_TEMPORARY.fullmatch, [*folders, *files]):
                path = Path(folder) / name
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    with contextlib.suppress(OSError):
                        path.unlink()
            folders[:] = [name for name in folders if not _TEMPORARY.fullmatch(name)]
