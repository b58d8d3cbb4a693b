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
import shutil
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdraft.errors import FastDraftError
from fastdraft.machine import TEMPORARY, disk_errors

MANIFEST, FINGERPRINT, SCHEMA = "manifest.json", "fingerprint.json", 1
_HELD: list[Path] = []
"""Runs that this process has locked."""
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
SCRATCH = ("steps", ".journal", "converted")
"""Folders of resume checkpoints, journals and converted copies of the target, of no use once a stage is complete."""


def write_atomic(path: Path, content: bytes | str) -> None:
    """Writes the whole file under a temporary name, forces it to disk, then renames it over `path`.

    Raises:
        FastDraftError: when the disk is full or the folder cannot be written.
    """
    with atomic_path(path) as temporary:
        # A lone surrogate (a file name that is no UTF-8, a damaged text) becomes its escape, which JSON reads back as it was.
        temporary.write_bytes(
            content.encode(errors="backslashreplace") if isinstance(content, str) else content
        )


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path` for a library to write to; renamed over `path` when the block succeeds."""
    with disk_errors(path):
        temporary = _beside(path)
        try:
            yield temporary
            _force(temporary)
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields an empty temporary folder beside `path`; it takes the place of `path` when the block succeeds."""
    with disk_errors(path):
        temporary = _beside(path)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    with contextlib.suppress(
                        PermissionError
                    ):  # a library may write files that even their owner may only read
                        _force(file)
            if path.exists():
                shutil.rmtree(path)
            os.replace(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _beside(path: Path) -> Path:
    """The temporary name. Its folder is made, in a run that this process works at only if the folder around it stands:
    where that has gone, somebody has moved or deleted the whole run, and no part of it may be begun in its old place.
    """
    path.parent.mkdir(parents=not any(root in path.parents for root in _HELD), exist_ok=True)
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _force(file: Path) -> None:
    """To the disk: after a power cut a file under its final name must not be empty."""
    with open(file, "rb+") as opened:
        os.fsync(opened.fileno())


def write_json(path: Path, value: object) -> None:
    """Pretty JSON, keys in the order given, written atomically."""
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        FastDraftError: when the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FastDraftError(
            path, "missing", "this file must exist", "run the stage that writes it"
        ) from None
    except (ValueError, RecursionError, OSError) as error:
        raise FastDraftError(
            path, f"unreadable ({error})", "must be valid JSON", "delete this folder and run its stage again"
        ) from None


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
        raise FastDraftError(
            self._path,
            f"no '{key}'",
            "must hold what its stage wrote",
            "delete this folder and run its stage again",
        )


@dataclass(frozen=True)
class StageFolder:
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
            FastDraftError: when the stage is not finished or the manifest is damaged.
        """
        value = read_json(self.path / MANIFEST)
        schema = value.get("schema") if isinstance(value, dict) else None
        if isinstance(schema, int) and schema > SCHEMA:
            found, rule = f"schema {schema}, of a newer release", f"this release reads schema {SCHEMA}"
            raise FastDraftError(
                self.path / MANIFEST,
                found,
                rule,
                f"upgrade fastdraft, or do it again with --redo {self.name}",
            )
        if schema != SCHEMA:
            raise FastDraftError(
                self.path / MANIFEST,
                "another schema",
                f"must be schema {SCHEMA}",
                "delete this folder and run its stage again",
            )
        return _Fields(self.path / MANIFEST, value)

    def digest(self) -> str:
        """Stands for this artifact in the fingerprints of the stages after it."""
        return digest(self.stored_fingerprint())

    def stored_fingerprint(self) -> dict[str, Any]:
        """What the work in this folder was begun under.

        Raises:
            FastDraftError: when there is none or it is damaged.
        """
        value = read_json(self.path / FINGERPRINT)
        if not isinstance(value, dict):
            raise FastDraftError(
                self.path / FINGERPRINT,
                "not a mapping",
                "must hold the stage's settings",
                "delete this folder and run its stage again",
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
            raise FastDraftError(self.path / FINGERPRINT, "nested too deeply", rule, remedy) from None
        new = flatten(json.loads(json.dumps(fingerprint, default=str)))
        return [
            f"{key} ({old.get(key, 'unset')} -> {new.get(key, 'unset')})"
            for key in sorted({*old, *new})
            if old.get(key) != new.get(key)
        ]

    def begin(self, fingerprint: Mapping[str, Any]) -> None:
        """Claims the folder for these settings, or goes on with work begun under the same ones.

        Raises:
            FastDraftError: when the folder holds work begun under other settings.
        """
        changed = self.differences(fingerprint)
        if changed:
            raise FastDraftError(
                self.path,
                "; ".join(changed[:4]),
                "this work was done with other settings",
                f"use another run.name, or redo it with --redo {self.name}",
            )
        if not (self.path / FINGERPRINT).exists():
            write_json(self.path / FINGERPRINT, fingerprint)

    def refuse_orphans(self, fingerprint: Mapping[str, Any]) -> None:
        """Work without a fingerprint may be of any settings; only a manifest that names these lets it count as theirs.

        Raises:
            FastDraftError: when there is such work.
        """
        if (self.path / FINGERPRINT).exists() or not self.path.is_dir() or not any(self.path.iterdir()):
            return
        if self.is_complete() and self.manifest().get("fingerprint") == digest(
            json.loads(json.dumps(fingerprint, default=str))
        ):
            return
        found, rule = (
            f"{FINGERPRINT} is missing beside other files",
            "it tells with which settings they were made",
        )
        raise FastDraftError(
            self.path, found, rule, f"put it back, or do the stage again with --redo {self.name}"
        )

    def complete(self, **fields: Any) -> None:
        """Writes the manifest: from here on the stage counts as finished."""
        write_json(
            self.path / MANIFEST,
            {"schema": SCHEMA, "stage": self.name, "fingerprint": self.digest(), **fields},
        )

    def remove_scratch(self) -> None:
        """Removes what only an unfinished stage needs; a kill right after the manifest may have left it."""
        for name in SCRATCH:
            shutil.rmtree(self.path / name, ignore_errors=True)

    def discard(self) -> None:
        """Removes the stage's work: gone at once for everybody, then file by file, so that a kill half-way leaves no part of it."""
        aside = self.path.with_name(f".{self.name}.{os.getpid()}.tmp")
        shutil.rmtree(aside, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            try:
                os.replace(self.path, aside)
            except PermissionError:  # Windows, where somebody looks into it
                (self.path / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(self.path, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


@dataclass(frozen=True)
class RunFolder:
    """`runs/NAME`: one folder for each stage."""

    root: Path

    def folder(self, name: str) -> StageFolder:
        return StageFolder(self.root / name)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the run for this process; the operating system lets go when the process dies.

        What killed processes left half-written is removed: nobody else writes here while the lock is held.

        Raises:
            FastDraftError: when another process holds it. FastDraftError: when the folder cannot be made or written.
        """
        with disk_errors(self.root):
            try:
                self.root.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError, FileNotFoundError):
                rule = "the run's folder must be one that can be made"
                raise FastDraftError(
                    self.root, "no folder can be made here", rule, "set another run.folder"
                ) from None
            lock = _acquire_lock(self.root)
        _HELD.append(self.root)
        try:
            self._remove_unfinished()
            yield
        finally:
            _HELD.remove(self.root)
            lock.release()

    def _remove_unfinished(self) -> None:
        for folder, folders, files in os.walk(self.root):
            for name in filter(TEMPORARY.fullmatch, [*folders, *files]):
                path = Path(folder) / name
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    with contextlib.suppress(OSError):
                        path.unlink()
            folders[:] = [name for name in folders if not TEMPORARY.fullmatch(name)]


def _acquire_lock(root: Path) -> Any:
    """The held lock of a run's folder.

    Where the file server knows no locks that die with their process, a file with the owner's name stands for one.
    """
    from filelock import FileLock, SoftFileLock, Timeout

    lock, marker = FileLock(str(root / ".lock"), timeout=0), root / ".lock.held"
    try:
        try:
            lock.acquire()
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            if _owner_is_dead(marker):
                marker.unlink(missing_ok=True)
            lock = SoftFileLock(str(marker), timeout=0)
            lock.acquire()
    except Timeout:
        remedy = f"wait for it, or use another run.name{f'; if its machine is dead, delete {marker}' if marker.exists() else ''}"
        raise FastDraftError(
            root, "in use by another process", "one process at a time may write a run", remedy
        ) from None
    return lock


def _owner_is_dead(marker: Path) -> bool:
    """Whether the process of this machine that a marker names is no more; False for other machines, of which nobody here can tell."""
    try:
        pid, host = marker.read_text(encoding="utf-8").split()[:2]
        if host != socket.gethostname() or os.name != "posix":
            return False
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError):
        return False
    return False
