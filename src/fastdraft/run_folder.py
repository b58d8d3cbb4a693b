"""A run's folder: one folder per stage, each complete when its `manifest.json` stands.

folder = RunFolder(Path("runs/demo")).folder("evaluate")
folder.begin(fingerprint); found = folder.keep("latency.json", measure); folder.complete(prompts=100)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from fastdraft.errors import FastDraftError

MANIFEST, FINGERPRINT, SCHEMA = "manifest.json", "fingerprint.json", 1
_LAYOUT = 2
"""Of what stages keep in their folders; work of another release is refused. Not in manifests, whose schema is public."""
_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")
_SCRATCH = ("steps", ".journal", "converted")
"""Of no use once a stage is complete: resume checkpoints, journals, converted copies of the target."""

T = TypeVar("T")


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path` for a library to write to; renamed over `path` when the block succeeds."""
    temporary = _beside(path)
    try:
        yield temporary
        _force(temporary)
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)  # what the user knows
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields an empty temporary folder beside `path`; it takes the place of `path` when the block succeeds."""
    temporary = _beside(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with contextlib.suppress(PermissionError):  # a library may write files that are read-only
                    _force(file)
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _beside(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _force(file: Path) -> None:
    with open(
        file, "rb+"
    ) as opened:  # to the disk: after a power cut a file under its final name must not be empty
        os.fsync(opened.fileno())


def write_atomic(path: Path, content: bytes | str) -> None:
    """Writes the whole file under a temporary name, forces it to disk, then renames it over `path`."""
    with atomic_path(path) as temporary:
        # Half a surrogate pair (of a file's name, a damaged text) becomes its escape, which JSON reads back as it was.
        temporary.write_bytes(
            content.encode(errors="backslashreplace") if isinstance(content, str) else content
        )


def write_json(path: Path, value: object) -> None:
    """Pretty JSON, keys in the order given, written atomically."""
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The value of a JSON file that this program wrote."""
    with _readable(path):
        return json.loads(path.read_text(encoding="utf-8"))


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """The one message about files that this program wrote itself and cannot read."""
    try:
        yield
    except FileNotFoundError:
        raise FastDraftError(
            f"{path}: missing; this file must exist", "run the stage that writes it"
        ) from None
    except (ValueError, LookupError, TypeError, EOFError, OSError, RecursionError) as error:
        raise FastDraftError(
            f"{path}: unreadable ({error})", "delete it and run the same command again"
        ) from error


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


@dataclass(frozen=True)
class StageFolder:
    """One stage's folder: its fingerprint is written first, its manifest last."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    def is_complete(self) -> bool:
        return (self.path / MANIFEST).is_file()

    def manifest(self) -> dict[str, Any]:
        """What the stage wrote about its result; at least `schema`, `stage` and `fingerprint`."""
        value: dict[str, Any] = read_json(self.path / MANIFEST)
        if not isinstance(value, dict) or value.get("schema") != SCHEMA:
            raise FastDraftError(
                f"{self.path / MANIFEST}: not of schema {SCHEMA}, which this release reads",
                f"redo the stage with --redo {self.name}",
            )
        return value

    def stored_fingerprint(self) -> dict[str, Any]:
        """What the work in this folder was begun under."""
        value: dict[str, Any] = read_json(self.path / FINGERPRINT)
        return value

    def digest(self) -> str:
        """Stands for this folder's result in the fingerprints of the stages after it."""
        return digest(self.stored_fingerprint())

    def differences(self, fingerprint: Mapping[str, Any]) -> list[str]:
        """The keys, with both values, in which existing work differs from `fingerprint`; empty for none or no work yet."""
        if not (self.path / FINGERPRINT).exists():
            return []
        old = flatten(self.stored_fingerprint())
        new = flatten(json.loads(json.dumps({**fingerprint, "layout": _LAYOUT}, default=str)))
        if old.get("layout") != _LAYOUT:
            return ["made by another release of fastdraft"]
        return [
            f"{key} ({old.get(key, 'unset')} -> {new.get(key, 'unset')})"
            for key in sorted({*old, *new})
            if old.get(key) != new.get(key)
        ]

    def begin(self, fingerprint: Mapping[str, Any]) -> None:
        """Claims the folder for these settings, or goes on with work begun under the same ones; other work is refused."""
        changed = self.differences(fingerprint)
        if changed:
            raise FastDraftError(
                f"{self.path}: {'; '.join(changed[:4])}: this work was done with other settings",
                f"use another run.name, or redo it with --redo {self.name}",
            )
        if not (self.path / FINGERPRINT).exists():
            write_json(self.path / FINGERPRINT, {**fingerprint, "layout": _LAYOUT})

    def has(self, name: str) -> bool:
        """Whether `keep` has a result of that name."""
        return (self.path / name).exists()

    def keep(
        self,
        name: str,
        make: Callable[[], T],
        *,
        read: Callable[[Path], T] = read_json,
        write: Callable[[Path, T], object] = write_json,
    ) -> T:
        """What `name` holds; made and written, all of it or nothing, where it is not there yet.

        A killed stage repeats one of these. The result is always what `read` gives, so that a resumed run sees the very same.

        Args:
            name: A path inside the folder.
            make: Called only where the file is not there.
            read: Reads the file; whatever it raises becomes one line for the user.
            write: Given a temporary path and the result.
        """
        path = self.path / name
        if not path.exists():
            value = make()
            with atomic_path(path) as temporary:
                write(temporary, value)
        with _readable(path):
            return read(path)

    def complete(self, **fields: Any) -> None:
        """Writes the manifest: from here on the stage counts as finished."""
        write_json(
            self.path / MANIFEST,
            {"schema": SCHEMA, "stage": self.name, "fingerprint": self.digest(), **fields},
        )

    def remove_scratch(self) -> None:
        """Removes what only an unfinished stage needs; a kill right after the manifest may have left it."""
        for name in _SCRATCH:
            shutil.rmtree(self.path / name, ignore_errors=True)

    def discard(self) -> None:
        """Removes the stage's work: gone at once for everybody, then file by file, so that a kill half-way leaves no part of it."""
        aside = self.path.with_name(f".{self.name}.{os.getpid()}.tmp")
        shutil.rmtree(aside, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            os.replace(self.path, aside)
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
        """
        lock = FileLock(str(self.root / ".lock"), timeout=0)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise FastDraftError(
                f"{self.root}: in use by another process; one at a time may write a run",
                "wait for it, or use another run.name",
            ) from None
        except OSError as error:
            raise FastDraftError(
                f"{self.root}: no folder can be made here ({error.strerror})", "set another run.folder"
            ) from None
        try:
            for path in filter(lambda path: _TEMPORARY.fullmatch(path.name), list(self.root.rglob(".*.tmp"))):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
            yield
        finally:
            lock.release()
